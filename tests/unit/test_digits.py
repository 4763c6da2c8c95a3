"""The bundled task: its images, words, noise and probe, and the model that starts on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.digits import SYSTEM_PROMPT, DigitsTask, build_tokenizer, write_base_model, write_digits_task
from prism_nemo.data.digits_text import QUESTIONS, probe, respond, respond_noisily, result
from prism_nemo.data.readers import read_records
from prism_nemo.data.records import Record
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.rewards.format import parse_response

SIZES = {"num_public": 120, "num_teacher": 60, "num_prompts": 40, "num_test": 60}
ALL = tuple(QUESTIONS)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> DigitsTask:
    return write_digits_task(tmp_path_factory.mktemp("task") / "digits", seed=5, questions=ALL, **SIZES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "base"
    write_base_model(out, seed=5)
    return out


def records(path: Path) -> list[Record]:
    found = read_records(path, image_root=None)
    assert not found.bad
    return found.records


def test_responses_by_hand() -> None:
    expected = {
        "largest": "3 5 1 largest is 5 </think> <answer> 5",
        "difference": "3 5 1 largest 5 minus smallest 1 is 4 </think> <answer> 4",
        "evens": "3 odd 5 odd 1 odd is 0 </think> <answer> 0",
        "sum": "3 plus 5 is 8 plus 1 is 9 </think> <answer> 9",
    }
    for question, text in expected.items():
        assert respond(question, [3, 5, 1]).text == f"<caption> 3 5 1 </caption> <think> {text} </answer>"
    assert respond("sum", [9, 9, 9, 9]).think == "9 plus 9 is 18 plus 9 is 27 plus 9 is 36"
    assert respond("evens", [0, 2, 3, 8]).think == "0 even 2 even 3 odd 8 even is 3"
    assert respond("difference", [3, 5, 1], answer=7).text.endswith("minus smallest 1 is 7 </think> <answer> 7 </answer>")


def test_files_and_fields(task: DigitsTask) -> None:
    public, teacher, prompts, test = (records(path) for path in (task.public, task.teacher, task.prompts, task.test))
    assert [len(part) for part in (public, teacher, prompts, test)] == list(SIZES.values())
    assert all(r.response and r.answer is None and r.caption is None and r.probe_response is None for r in public)
    assert all(r.response is None and r.answer and r.caption and r.probe_response is None for r in prompts)
    for record in (*teacher, *test):
        question, digits = record.metadata["question"], record.metadata["digits"]
        assert record.response == respond(question, digits).text
        assert (record.answer, record.caption) == (str(result(question, digits)), " ".join(map(str, digits)))
        assert record.prompt == f"<image> {QUESTIONS[question]}"
        assert record.probe_response and record.probe_response != record.response
    assert {r.metadata["question"] for r in public} == set(ALL)
    assert {len(r.metadata["digits"]) for r in test} == {3, 4}


def test_strips_are_shared_between_questions_but_not_in_the_test(task: DigitsTask) -> None:
    for path in (task.public, task.teacher, task.prompts):
        found = records(path)
        for start in range(0, len(found), len(ALL)):
            group = found[start : start + len(ALL)]
            assert len({record.images for record in group}) == 1
            assert {record.metadata["question"] for record in group} == set(ALL)
    test = records(task.test)
    assert len({record.images for record in test}) == len(test)
    assert {record.metadata["question"] for record in test} == set(ALL)


def test_images_show_the_digits(task: DigitsTask) -> None:
    """Scaled back to 8 x 8, every tile is nearest to the handwritten digit that the record names, among all of them."""
    originals = load_digits()
    flat = originals.images.reshape(len(originals.images), -1)
    for record in records(task.test)[:20]:
        image = Image.open(record.images[0].path or "")
        assert image.size == (32 * len(record.metadata["digits"]), 32)
        for index, (digit, source) in enumerate(zip(record.metadata["digits"], record.metadata["sources"], strict=True)):
            tile = image.crop((32 * index, 0, 32 * index + 32, 32)).resize((8, 8), Image.Resampling.BOX)
            distances = np.abs(flat - np.asarray(tile, dtype=float).reshape(-1) * 16 / 255).sum(axis=1)
            assert int(distances.argmin()) == source
            assert originals.target[source] == digit


def test_test_digits_are_seen_nowhere_else(task: DigitsTask) -> None:
    def sources(path: Path) -> set[int]:
        return {source for record in records(path) for source in record.metadata["sources"]}

    held_out = sources(task.test)
    assert len(held_out) > 100
    assert not held_out & (sources(task.public) | sources(task.teacher) | sources(task.prompts))


def test_the_seed_decides_every_byte(task: DigitsTask, tmp_path: Path) -> None:
    again = write_digits_task(tmp_path / "again", seed=5, questions=ALL, **SIZES)
    other = write_digits_task(tmp_path / "other", seed=6, questions=ALL, **SIZES)
    files = sorted(path.relative_to(task.root) for path in task.root.rglob("*") if path.is_file())
    assert len(files) == (120 + 60 + 40) // len(ALL) + 60 + 4
    assert files == sorted(path.relative_to(again.root) for path in again.root.rglob("*") if path.is_file())
    assert all((task.root / file).read_bytes() == (again.root / file).read_bytes() for file in files)
    assert task.test.read_text() != other.test.read_text()


def test_noise_has_the_published_rates() -> None:
    rng = np.random.default_rng(0)
    count, misread, wrong, clean = 20_000, 0, 0, 0
    read_as = np.zeros(10)
    for _ in range(count):
        digits = rng.integers(0, 10, 3).tolist()
        response = respond_noisily("difference", digits, rng)
        read = [int(word) for word in response.caption.split()]
        differences = [b for a, b in zip(digits, read, strict=True) if a != b]
        misread += len(differences)
        np.add.at(read_as, differences, 1)
        consistent = respond("difference", read)
        off = int(response.answer) - int(consistent.answer)
        assert off in (-1, 0, 1) and 0 <= int(response.answer) <= 9
        wrong += off != 0
        clean += response == respond("difference", digits)
        assert respond("difference", read, answer=int(response.answer)) == response  # it reasons from what it read
    assert misread / (3 * count) == pytest.approx(0.85 * 0.4, abs=0.01)
    assert wrong / count == pytest.approx(0.85 * 0.1, abs=0.01)
    assert clean / count == pytest.approx(0.15 + 0.85 * 0.6**3 * 0.9, abs=0.015)
    assert read_as / read_as.sum() == pytest.approx(np.full(10, 0.1), abs=0.01)


@pytest.mark.parametrize("question", ALL)
def test_probe_changes_one_digit_in_each_segment(question: str) -> None:
    rng = np.random.default_rng(1)
    same_change = one_word = 0
    for _ in range(300):
        digits = rng.integers(0, 10, int(rng.integers(3, 5))).tolist()
        true, other = respond(question, digits), probe(question, digits, rng)
        captions = list(zip(true.caption.split(), other.caption.split(), strict=True))
        assert sum(a != b for a, b in captions) == 1
        thinks = list(zip(true.think.split(), other.think.split(), strict=True))
        one_word += sum(a != b for a, b in thinks) == 1 and true.answer == other.answer
        assert any(a != b for a, b in thinks)
        step = {"evens": 2, "sum": 4}.get(question, 1)
        words = other.think.split()
        read = (
            [int(words[0]), *map(int, words[2::4])]
            if question == "sum"
            else [int(word) for word in words[: step * len(digits) : step]]
        )
        assert sum(a != b for a, b in zip(digits, read, strict=True)) == 1
        assert respond(question, read) == dataclasses.replace(other, caption=" ".join(map(str, read)))  # consistent in itself
        same_change += other.caption == " ".join(map(str, read))
    assert same_change < 60
    assert one_word >= (0 if question == "sum" else 290)


def test_every_text_is_in_the_vocabulary_and_comes_back(task: DigitsTask, model: Path) -> None:
    encoder = ChatEncoder.from_directory(model, DataConfig(train=str(task.public), system_prompt=SYSTEM_PROMPT), image_root=None)
    lengths = []
    for path in (task.public, task.teacher, task.prompts, task.test):
        for record in records(path):
            prompt = encoder.encode_prompt(record)
            assert int(prompt.image_mask.sum()) == len(record.metadata["digits"])  # one merged token a digit
            for text in filter(None, (record.response, record.probe_response)):
                tokens = encoder.encode_response(text)
                lengths.append(len(tokens))
                assert encoder.decode(tokens) == text
                assert parse_response(text) is not None
    assert 15 < np.mean(lengths) < 25
    parsed = parse_response(records(task.teacher)[0].response or "")
    assert parsed is not None
    assert (parsed.caption.strip(), parsed.answer.strip()) == (records(task.teacher)[0].caption, records(task.teacher)[0].answer)


def test_strips_reach_the_model_unscaled(task: DigitsTask, model: Path) -> None:
    encoder = ChatEncoder.from_directory(model, DataConfig(train=str(task.test), system_prompt=SYSTEM_PROMPT), image_root=None)
    for record in records(task.test)[:10]:
        count = len(record.metadata["digits"])
        prompt = encoder.encode_prompt(record)
        assert prompt.image_grid_thw.tolist() == [[1, 2, 2 * count]]
        pixels = torch.from_numpy(np.asarray(Image.open(record.images[0].path or ""), dtype=np.float32)) / 127.5 - 1
        blocks = prompt.pixel_values.view(count, 2, 2, 3, 2, 16, 16)  # digit, row and column of the patch, channel, frame, pixels
        for channel in range(3):
            for frame in range(2):
                shown = blocks[:, :, :, channel, frame].permute(1, 3, 0, 2, 4).reshape(32, 32 * count)
                torch.testing.assert_close(shown, pixels, atol=1e-6, rtol=0)


def test_the_tokenizer_is_small_and_whole() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == 64
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.tokenize("<caption> 3 36 </caption> zebra") == ["<caption>", "3", "36", "</caption>", "<|unknown|>"]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(SYSTEM_PROMPT)) == [8, 10, 12]


def test_the_model_is_a_qwen3_vl_that_transformers_loads(model: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    assert isinstance(config, Qwen3VLConfig)
    assert config.text_config.rope_parameters["mrope_section"] == [6, 5, 5]
    assert config.text_config.vocab_size == 64 and config.tie_word_embeddings
    assert {path.name for path in model.iterdir()} >= {
        "README.md",
        "generation_config.json",
        "model.safetensors",
        "chat_template.jinja",
    }
    loaded, info = Qwen3VLForConditionalGeneration.from_pretrained(model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    count = sum(parameter.numel() for parameter in loaded.parameters())
    assert 1.0e6 < count < 1.4e6
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_transformers_runs_the_model_on_an_encoded_record(task: DigitsTask, model: Path) -> None:
    encoder = ChatEncoder.from_directory(model, DataConfig(train=str(task.test), system_prompt=SYSTEM_PROMPT), image_root=None)
    prompt = encoder.encode_prompt(records(task.test)[0])
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(model)
    inputs = {"input_ids": prompt.input_ids[None], "pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    with torch.no_grad():
        logits = loaded(**inputs, mm_token_type_ids=prompt.image_mask[None].int()).logits
        own_positions = loaded(**inputs, position_ids=prompt.position_ids[:, None]).logits
        blank = loaded(
            **inputs | {"pixel_values": torch.zeros_like(prompt.pixel_values)}, position_ids=prompt.position_ids[:, None]
        ).logits
    assert logits.shape == (1, len(prompt), 64) and bool(logits.isfinite().all())
    assert torch.equal(logits, own_positions)
    assert not torch.allclose(logits[0, -1], blank[0, -1])  # the image is seen


def test_nothing_is_overwritten(task: DigitsTask, model: Path) -> None:
    before = task.test.read_bytes()
    with pytest.raises(DataError, match="not empty"):
        write_digits_task(task.root, seed=1, **SIZES)
    assert task.test.read_bytes() == before
    with pytest.raises(DataError, match="not empty"):
        write_base_model(model, seed=1)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_digits_task(tmp_path / "task", seed=1, **SIZES)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".task.partial").mkdir()  # of a run that was killed
    (tmp_path / "task").mkdir()
    assert write_digits_task(tmp_path / "task", seed=1, **SIZES).test.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_impossible_tasks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)\['median'\].*largest, difference, evens, sum"):
        write_digits_task(tmp_path / "x", seed=1, questions=("median",), **SIZES)
    with pytest.raises(ConfigError, match="without records"):
        write_digits_task(tmp_path / "x", seed=1, **SIZES | {"num_test": 0})
    assert not list(tmp_path.iterdir())
