"""The `generate` command: what it writes, against engine and grader themselves, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import one_rank
from helpers.served import served
from helpers.stages import run_stage, settings, stage_config, tiny_task, trained_policy, written
from helpers.stopped_runs import signal_behind_batch

import prism_nemo
from prism_nemo import cli
from prism_nemo.config.compose import load_config
from prism_nemo.config.schema import RewardConfig
from prism_nemo.convert.commands import export_hf, find_checkpoint
from prism_nemo.curate.pass_rates import read_pass_rates
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.readers import read_records
from prism_nemo.errors import ConfigError, DataError, PrismError
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rewards.format import parse_response
from prism_nemo.rewards.grader import Grader
from prism_nemo.rollout.base import rollout_seed
from prism_nemo.rollout.batch import sampling_params
from prism_nemo.rollout.megatron import MegatronEngine
from prism_nemo.run_directory import read_json_lines
from prism_nemo.stages import generate
from prism_nemo.stages.parts import PartFiles

SHORT = ("rollout.num_rollouts_per_prompt=4", "data.max_response_length=20")  # some responses do not end
EVERYTHING = (*SHORT, "generate.token_ids=true", "generate.log_probs=true")
SMALL_BATCHES = (*EVERYTHING, "rollout.max_batch_size=24")  # four batches of six prompts
ROOT = Path(prism_nemo.__file__).parent.parent
DOCUMENTATION = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    return run_stage("generate", tmp_path_factory.mktemp("generate") / "run", *SMALL_BATCHES)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    shutil.copytree(tiny_task().data.root, tmp_path / "data")
    return tmp_path / "data"


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, expected: Path) -> None:
    for name in ("responses.jsonl", "pass_rates.jsonl"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    assert written(run) == written(expected)
    assert not (run / "parts").exists()


def edit(file: Path, **changed: dict[str, Any]) -> None:
    """Changes fields of the records at these line numbers (`_5`), from 0."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, fields in changed.items():
        rows[int(number[1:])] |= fields
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# What is written


def test_responses_are_those_of_the_engine(whole: Path, tmp_path: Path) -> None:
    """Of an engine of its own that gets all prompts in one call: tokens, ends, log-probabilities and text."""
    config = stage_config("generate", tmp_path, *EVERYTHING)
    policy = PolicyModel(config.model, config.parallel, one_rank())
    engine = MegatronEngine(policy.chunks, device=one_rank().device, max_batch_size=512)
    engine.update_weights(policy.hf_tensors(), 0)
    encoder = ChatEncoder.from_directory(policy.assets, config.data, image_root=None)
    records = read_records(tiny_task().data.prompts, image_root=None).records[:24]
    found = lines(whole)
    assert [(line["id"], line["prompt"], line["answer"]) for line in found] == [(r.id, r.prompt, r.answer) for r in records]
    seeds = [rollout_seed(config.runtime.seed, 0, record.id, index) for record in records for index in range(4)]
    prompts = [encoder.encode_prompt(record) for record in records]
    rollouts = engine.generate(prompts, sampling_params(config.rollout, encoder), num_rollouts_per_prompt=4, seeds=seeds)
    responses = [response for line in found for response in line["responses"]]
    assert len(responses) == len(rollouts) == 96
    for response, rollout in zip(responses, rollouts, strict=True):
        assert response["token_ids"] == rollout.tokens.tolist() and response["tokens"] == len(rollout.tokens)
        assert response["finish_reason"] == rollout.finish_reason
        assert response["log_probs"] == pytest.approx(rollout.log_probs.tolist(), abs=1e-5)
        assert response["text"] == encoder.decode(rollout.tokens)
    assert {response["finish_reason"] for response in responses} == {"stop", "length"}


def test_answers_are_graded_and_counted(whole: Path) -> None:
    records = read_records(tiny_task().data.prompts, image_root=None).records[:24]
    found = lines(whole)
    with Grader(RewardConfig()) as grader:
        for line, record in zip(found, records, strict=True):
            for response in line["responses"]:
                (reward,) = grader.grade([response["text"]], [record])
                parsed = parse_response(response["text"])
                assert reward is not None and (response["correct"], response["reward"]) == (reward.accuracy, reward.score)
                assert (response["valid"], response["extracted"]) == (parsed is not None, parsed and parsed.answer)
    responses = [response for line in found for response in line["responses"]]
    right = sum(response["correct"] for response in responses)
    assert 0 < right < len(responses)
    rates = read_pass_rates(whole / "pass_rates.jsonl", dict(enumerate(records)))
    assert [(rate.solved, rate.of) for rate in rates.values()] == [
        (sum(response["correct"] for response in line["responses"]), 4) for line in found
    ]
    (metrics,) = written(whole)[0]
    assert metrics == {
        "step": 1,
        "prefix": "train",
        "prompts": 24,
        "responses": 96,
        "bad_records": 0,
        "format_rate": sum(response["valid"] for response in responses) / 96,
        "response_length": sum(response["tokens"] for response in responses) / 96,
        "truncated": sum(response["finish_reason"] == "length" for response in responses) / 96,
        "timeouts": 0,
        "solved": right / 96,
    }


def test_only_what_was_asked_for_is_written_and_batches_change_nothing(whole: Path, tmp_path: Path) -> None:
    found = lines(run_stage("generate", tmp_path / "run", *SHORT, "generate.grade=false"))
    names = ("text", "finish_reason", "tokens", "valid", "extracted")
    expected = [[{name: response[name] for name in names} for response in line["responses"]] for line in lines(whole)]
    assert [line["responses"] for line in found] == expected
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock") == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "responses.jsonl",
        "status.json",
    ]
    assert "solved" not in written(tmp_path / "run")[0][0]


def test_records_without_answers_are_not_graded(whole: Path, data: Path, tmp_path: Path) -> None:
    edit(data / "prompts.jsonl", _0={"answer": None}, _2={"answer": None})
    run = run_stage("generate", tmp_path / "run", *SMALL_BATCHES, f"data.train={data / 'prompts.jsonl'}", "limit_samples=3")
    found, expected = lines(run), lines(whole)[:3]
    for number in (0, 2):
        assert found[number]["answer"] is None
        for response, other in zip(found[number]["responses"], expected[number]["responses"], strict=True):
            assert response == other | {"correct": None, "reward": None}
    assert found[1] == expected[1]
    assert (run / "pass_rates.jsonl").read_text() == (whole / "pass_rates.jsonl").read_text().splitlines(keepends=True)[1]


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    run = run_stage("generate", tmp_path / "run", "reward.name=helpers.custom_rewards:half", "limit_samples=2")
    responses = [response for line in lines(run) for response in line["responses"]]
    assert [(response["reward"], response["correct"]) for response in responses] == [(0.5, 0.25)] * 4
    assert [row["solved"] for row in read_json_lines(run / "pass_rates.jsonl")] == [0, 0]


def test_greedy_takes_the_likeliest_tokens_whatever_the_seed(tmp_path: Path) -> None:
    given = ("rollout.temperature=0", "rollout.num_rollouts_per_prompt=1", "limit_samples=6")
    runs = [run_stage("generate", tmp_path / seed, *given, f"runtime.seed={seed}") for seed in ("1", "2")]
    assert lines(runs[0]) == lines(runs[1])


def test_run_step_and_huggingface_directory_are_one_policy(whole: Path, tmp_path: Path) -> None:
    step = trained_policy() / "checkpoints" / "step_00000040"
    export_hf(find_checkpoint(step), tmp_path / "hf")
    for name, path in (("step", step), ("hf", tmp_path / "hf")):
        run = run_stage("generate", tmp_path / name, *SMALL_BATCHES, f"model.path={path}", "limit_samples=6")
        assert lines(run) == lines(whole)[:6]


def test_the_documentation_names_what_is_written(whole: Path) -> None:
    (line,) = re.findall(r"^\| `responses.jsonl` \|(.*)\|$", DOCUMENTATION, re.MULTILINE)
    assert re.findall(r"`(\w+)`", line) == list(lines(whole)[0])
    described = DOCUMENTATION.partition("| of a response | |")[2].partition("\n\n")[0]
    names = [name for cell in re.findall(r"^\| (`.*?) \|", described, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)]
    assert names == list(lines(whole)[0]["responses"][0])


def test_the_commands_of_the_documentation_compose() -> None:
    first, *others = (
        shlex.split(words, comments=True) for words in re.findall(r"^ {4}prism-nemo generate (.*)$", DOCUMENTATION, re.M)
    )
    assert len(others) == 3
    for words in ([], *(words[1:] for words in others)):
        load_config("generate", [*first, *words])


# Engines


def test_servers_of_their_own_write_the_same(whole: Path, tmp_path: Path) -> None:
    """A server that the run starts; it is gone when the run is."""
    separate = ("rollout.placement=separate", "rollout.servers.prompts_per_request=6")
    run = run_stage("generate", tmp_path / "run", *SMALL_BATCHES, *separate)
    assert_same_run(run, whole)
    assert list((run / "servers").glob("*.log")), "what they said stays with the run"


@pytest.mark.vllm
def test_vllm_with_shared_draws_writes_what_the_megatron_engine_does(tmp_path: Path) -> None:
    """A model whose heads vLLM's CPU kernels know; it is untrained, so its responses have no format."""
    given = (f"model.path={served().directory}", *EVERYTHING, "limit_samples=6")
    expected = lines(run_stage("generate", tmp_path / "megatron", *given))
    vllm = ("rollout.engine=vllm", "rollout.vllm.kv_cache_gb=0.1", "rollout.vllm.draws=shared")
    found = lines(run_stage("generate", tmp_path / "vllm", *given, *vllm))
    for line, other in zip(found, expected, strict=True):
        for response, wanted in zip(line.pop("responses"), other.pop("responses"), strict=True):
            assert response.pop("log_probs") == pytest.approx(wanted.pop("log_probs"), abs=2e-5)
            assert response == wanted
        assert line == other


# Stopped runs


@pytest.mark.parametrize(("sent", "kept"), [(signal.SIGTERM, 12), (signal.SIGUSR1, 9)])
def test_a_stopped_run_goes_on(
    sent: signal.Signals, kept: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the second of four batches. With `kept` of 9 as if a kill had cut that batch short: it is sampled whole again."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_behind_batch(patch, 2, sent)
        with pytest.raises(SystemExit) as caught:
            run_stage("generate", run, *SMALL_BATCHES)
    assert caught.value.code == 75
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert not (run / "responses.jsonl").exists()
    part = run / "parts" / "rank_00000.jsonl"
    rows = part.read_text().splitlines(keepends=True)
    assert [json.loads(row)["record"] for row in rows] == list(range(12))
    part.write_text("".join(rows[:kept]) + '{"record": 12, "respon')
    added = []
    append = PartFiles.append

    def note(self: PartFiles, rows: Any) -> None:
        added.append([row["record"] for row in rows])
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "append", note)
        run_stage("generate", run, *SMALL_BATCHES)
    assert [number for batch in added for number in batch] == list(range(kept, 24))
    assert_same_run(run, whole)


def test_a_killed_command_goes_on(whole: Path, tmp_path: Path) -> None:
    """The command itself, killed as soon as it has written a part."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "prism_nemo", "generate", *settings("generate", run, *SMALL_BATCHES)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        part = run / "parts" / "rank_00000.jsonl"
        deadline = time.monotonic() + 240
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)[0]
            time.sleep(0.001)
    finally:
        process.kill()
        process.communicate()
    assert not (run / "responses.jsonl").exists()
    run_stage("generate", run, *SMALL_BATCHES)
    assert_same_run(run, whole)


def test_a_run_that_died_as_it_wrote_its_results_writes_them_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def die(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "pass_rate_lines", die)
        with pytest.raises(KeyboardInterrupt):
            run_stage("generate", run, *SMALL_BATCHES)
    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "append", lambda *_: pytest.fail("sampled again"))
        run_stage("generate", run, *SMALL_BATCHES)
    assert_same_run(run, whole)


def test_a_stopped_run_does_not_go_on_with_another_policy_prompts_or_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, run, prompts = tmp_path / "policy", tmp_path / "run", data / "prompts.jsonl"
    shutil.copytree(trained_policy(), policy)
    given = (*SMALL_BATCHES, f"model.path={policy}", f"data.train={prompts}")
    with monkeypatch.context() as patch:
        signal_behind_batch(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run_stage("generate", run, *given)
    with pytest.raises(ConfigError, match=r"another run; different are\n +generate\.log_probs: True -> False"):
        run_stage("generate", run, *given, "generate.log_probs=false")
    latest = policy / "checkpoints" / "latest"
    newest = latest.read_text()
    latest.write_text("step_00000030")
    with pytest.raises(PrismError, match=r"another policy: .*step_00000040/policy, now .*step_00000030/policy"):
        run_stage("generate", run, *given)
    latest.write_text(newest)
    before = prompts.read_text()
    edit(prompts, _3={"answer": "17"})
    with pytest.raises(PrismError, match="another set of records"):
        run_stage("generate", run, *given)
    prompts.write_text(before)
    run_stage("generate", run, *given)
    assert len(lines(run)) == 24


# What cannot be used


def test_unusable_records_are_left_out_counted_and_listed(whole: Path, data: Path, tmp_path: Path) -> None:
    """A line that is no record, an image that is not there, an answer of no kind; the other responses are as they were."""
    file = data / "prompts.jsonl"
    edit(file, _5={"images": ["images/none.png"]}, _7={"answer_kind": "poem"})
    rows = file.read_text().splitlines()
    names = [json.loads(row)["id"] for row in rows]
    file.write_text("".join(row + "\n" for row in [*rows[:24], "{"]))
    given = (*EVERYTHING, f"data.train={file}", "data.max_bad_sample_share=0.1")
    run = run_stage("generate", tmp_path / "run", *given)
    listed = {row["id"]: row["reason"] for row in read_json_lines(run / "bad_samples.jsonl")}
    assert listed.keys() == {"prompts:25", names[5], names[7]}
    assert "does not exist" in listed[names[5]] and "no kind of answer named 'poem'" in listed[names[7]]
    ids = [line["id"] for line in lines(run)]
    assert ids == [name for name in names[:24] if name not in listed]
    texts = {line["id"]: [response["text"] for response in line["responses"]] for line in lines(whole)}
    assert [[response["text"] for response in line["responses"]] for line in lines(run)] == [texts[name] for name in ids]
    assert written(run)[0][0]["bad_records"] == 2
    ungraded = run_stage("generate", tmp_path / "ungraded", *given, "generate.grade=false")
    assert [line["id"] for line in lines(ungraded)] == [name for number, name in enumerate(names[:24]) if number != 5]


def test_too_many_unusable_records_stop_the_run_and_what_was_sampled_is_kept(data: Path, tmp_path: Path) -> None:
    edit(data / "prompts.jsonl", _13={"images": ["images/none.png"]}, _14={"images": ["images/none.png"]})
    given = (*SMALL_BATCHES, f"data.train={data / 'prompts.jsonl'}")
    with pytest.raises(DataError, match="2 of 18 records cannot be used"):
        run_stage("generate", tmp_path / "run", *given, "data.max_bad_sample_share=0.05")
    assert len((tmp_path / "run" / "parts" / "rank_00000.jsonl").read_text().splitlines()) == 18
    run_stage("generate", tmp_path / "run", *given, "data.max_bad_sample_share=0.1")
    assert len(lines(tmp_path / "run")) == 22


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.trian=x.jsonl"], "did you mean data.train?"),
        (["data.train=absent.jsonl"], "data.train: absent.jsonl"),
        (["data.train=null"], "there is no data file"),
        (["data.image_root=absent"], "the image folder does not exist"),
        (["model.path=absent"], "model.path: absent"),
        (["generate.grade=perhaps"], "generate.grade"),
        (["generate.logprobs=true"], "did you mean generate.log_probs?"),
        (["limit_samples=0"], "limit_samples is 0"),
        (["rollout.temperature=0"], "greedy decoding gives the same response 2 times"),
        (["rollout.servers.urls=[http://127.0.0.1:1]"], "set rollout.placement=separate"),
        (["data.train=null", "data.mixture={a: {path: x.jsonl}}"], "set data.train, a run for each"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    overrides: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", *settings("generate", tmp_path / "run", *overrides)]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_reward_is_found_at_once_where_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no reward named 'exactt'"):
        run_stage("generate", tmp_path / "run", "reward.name=exactt")
    assert not (tmp_path / "run").exists()
