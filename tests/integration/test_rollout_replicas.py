"""Rollout servers as processes that the run starts: killed, frozen, broken from the start, and left alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.rollout_servers import assert_bit_equal, in_process, members, pid_of, policy_of, remote_engine, until
from helpers.stages import run_stage, written
from helpers.tiny import IMAGE_TOKEN, make_prompt, tiny_model

import prism_nemo
from prism_nemo.errors import ConfigError
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams, WeightsLostError
from prism_nemo.rollout.exchange import Address, ExchangeError
from prism_nemo.rollout.fleet import LocalMember
from prism_nemo.rollout.remote import RemoteEngine

PROMPTS = tuple(make_prompt([(4, 6)] if index % 2 else [], seed=index) for index in range(8))
LONG = SamplingParams(1.0, 1.0, 0, 120, -1, (IMAGE_TOKEN,))  # seconds a call: there is time to disturb it
COUNT = 2

pytestmark = pytest.mark.usefixtures("events")


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return policy_of(tiny_model())


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def busy(member: LocalMember) -> bool:
    """Whether the server is generating."""
    receiver = member.receiver
    return receiver is not None and receiver.address.get("/v1/health", timeout_seconds=60).json()["busy"] > 0


def disturb(engine: RemoteEngine, harm: Callable[[int], None], victims: list[LocalMember]) -> Any:
    """Rollouts during which the victims come to harm, each while it generates."""
    call = engine.start(PROMPTS, LONG, num_rollouts_per_prompt=COUNT, seeds=range(COUNT * len(PROMPTS)))
    for victim in victims:
        until(lambda victim=victim: busy(victim))
        harm(pid_of(victim))
    return call


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def test_killed_and_frozen_replicas_lose_nothing_and_come_back(
    policy: PolicyModel, tmp_path: Path, events: pytest.LogCaptureFixture
) -> None:
    """One of two is killed, then one frozen, then both are killed: each time all rollouts are there, once, and equal."""
    rollouts = in_process(policy, PROMPTS, LONG, COUNT)

    def of_version(version: int) -> list[Rollout]:
        return [replace(rollout, weights_version=version) for rollout in rollouts]

    with remote_engine(
        policy, directory=tmp_path, num_replicas=2, request_timeout_seconds=10.0, control_timeout_seconds=8.0
    ) as engine:
        engine.update_weights(policy.hf_tensors(), 3)
        first, second = members(engine)
        killed = pid_of(first)
        assert_bit_equal(disturb(engine, kill, [first]).collect(), of_version(3))
        assert re.search(r"replica 0: .*; prompt \d of call 1 will be sent again", events.text)
        assert re.search(r"replica 0 .*: it is started again", events.text)
        counts = engine.metrics()
        assert counts["resent_requests"][0] >= 1 and counts["servers_left_out"] == (1.0, 1.0)

        until(lambda: len(engine._fleet.up()) == 2)  # type: ignore[union-attr]
        assert gone(killed) and pid_of(first) != killed
        assert engine._fleet.restarts() == 1  # type: ignore[union-attr]
        engine.update_weights(policy.hf_tensors(), 4)
        frozen = pid_of(second)
        assert_bit_equal(disturb(engine, freeze, [second]).collect(), of_version(4))
        assert "replica 1: no answer within 10 s" in events.text
        assert engine.metrics()["late_answers"] == (1.0, 1.0)
        until(lambda: gone(frozen))

        until(lambda: len(engine._fleet.up()) == 2)  # type: ignore[union-attr]
        engine.update_weights(policy.hf_tensors(), 5)
        call = disturb(engine, kill, [first, second])
        collected = None
        while collected is None:
            try:
                collected = call.collect()
            except WeightsLostError:
                engine.restore_weights(5)
        assert_bit_equal(collected, of_version(5))

        until(lambda: len(engine._fleet.up()) == 2)  # type: ignore[union-attr]
        freeze(pid_of(first))
        engine.update_weights(policy.hf_tensors(), 6)
        assert "replica 0 did not get the weights of version 6: no answer within 8 s" in events.text
        seeds = range(COUNT * len(PROMPTS))
        assert_bit_equal(engine.generate(PROMPTS, LONG, num_rollouts_per_prompt=COUNT, seeds=seeds), of_version(6))
        pids = [pid_of(member) for member in members(engine)]
    assert all(map(gone, pids))
    assert not Path(f"/dev/shm/{engine._sender._shared_name}").exists()  # type: ignore[union-attr]


def test_generate_brings_the_weights_back_by_itself(policy: PolicyModel, tmp_path: Path) -> None:
    """The only server is killed while it generates."""
    with remote_engine(policy, directory=tmp_path) as engine:
        engine.update_weights(policy.hf_tensors(), 3)
        (only,) = members(engine)

        def harm() -> None:
            until(lambda: busy(only))
            kill(pid_of(only))

        thread = threading.Thread(target=harm)
        thread.start()
        found = engine.generate(PROMPTS, LONG, num_rollouts_per_prompt=COUNT, seeds=range(COUNT * len(PROMPTS)))
        thread.join()
        assert_bit_equal(found, in_process(policy, PROMPTS, LONG, COUNT, version=3))
        assert engine.metrics()["restarts"] == (1.0, 1.0)


def test_a_replica_that_cannot_start_is_an_error_with_its_last_words(policy: PolicyModel, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(policy.assets, directory)
    broken = policy_of(tiny_model())
    broken.assets = directory
    (directory / "config.json").write_text("{}")
    with remote_engine(broken, directory=tmp_path) as engine, pytest.raises(RolloutError) as raised:
        engine.update_weights(policy.hf_tensors(), 0)
    assert "replica 0: ended with status 2; the last lines of its log:" in raised.value.what
    assert "where: " in raised.value.what and str(directory) in raised.value.what
    assert (tmp_path / "servers" / "replica-0.log").read_text()


def test_a_replica_that_dies_again_and_again_is_given_up(policy: PolicyModel, tmp_path: Path) -> None:
    with remote_engine(policy, directory=tmp_path) as engine:
        (only,) = members(engine)
        pids = set()

        def kill_each() -> bool:
            if not only.hopeless and pid_of(only) not in pids:
                pids.add(pid_of(only))
                kill(pid_of(only))
            return only.hopeless

        until(kill_each)
        with pytest.raises(RolloutError, match=r"replica 0: ended with status -9"):
            engine.update_weights(policy.hf_tensors(), 0)
        assert len(pids) == 3


OWNER = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.rollout_servers import policy_of, remote_engine
from helpers.tiny import tiny_model
policy = policy_of(tiny_model())
with remote_engine(policy, directory=Path({directory!r})) as engine:
    engine.update_weights(policy.hf_tensors(), 0)
    print(next(iter(engine._fleet._members.values()))._process.process.pid, flush=True)
    time.sleep(600)
"""


def test_replicas_end_with_the_run_however_it_ends(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    code = OWNER.format(tests=tests, directory=str(tmp_path))
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        assert not gone(server)
        owner.kill()
        owner.wait()
        until(lambda: gone(server))
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()  # type: ignore[union-attr]


# The command


def test_the_command_serves_until_it_is_told_to_stop(policy: PolicyModel, tmp_path: Path) -> None:
    """As a person starts it, with a token; a run that is named its address uses it, and leaves it alive."""
    log = tmp_path / "log"
    arguments = [f"model.path={policy.assets}", "model.precision=fp32", "runtime.device=cpu", "serve.port=0"]
    environment = os.environ | {"PRISM_NEMO_ROLLOUT_TOKEN": "secret", "PYTHONPATH": str(Path(prism_nemo.__file__).parents[1])}
    with log.open("wb") as output:
        server = subprocess.Popen([sys.executable, "-m", "prism_nemo", "serve", *arguments], stderr=output, env=environment)
    try:
        found: list[str] = []

        def ready() -> bool:
            found[:] = re.findall(r"at (http://127\.0\.0\.1:\d+)\n", log.read_text())
            assert server.poll() is None, log.read_text()
            return bool(found)

        until(ready)
        (url,) = found
        assert Address(url, None).get("/v1/health", timeout_seconds=60).status == 401
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PRISM_NEMO_ROLLOUT_TOKEN", "secret")
            with remote_engine(policy, [url]) as engine:
                engine.update_weights(policy.hf_tensors(), 3)
                short = SamplingParams(1.0, 1.0, 0, 5, -1, ())
                seeds = range(COUNT * len(PROMPTS))
                rollouts = engine.generate(PROMPTS, short, num_rollouts_per_prompt=COUNT, seeds=seeds)
                assert_bit_equal(rollouts, in_process(policy, PROMPTS, short, COUNT, version=3))
        assert Address(url, "secret").get("/v1/health", timeout_seconds=60).json()["version"] == 3
        server.terminate()
        assert server.wait(60) == 0, log.read_text()
        with pytest.raises(ExchangeError):
            Address(url, "secret").get("/v1/health", timeout_seconds=60)
    finally:
        server.kill()
        server.wait()
    assert "secret" not in log.read_text()


def test_a_server_for_other_machines_needs_a_token(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from prism_nemo.config.compose import load_config
    from prism_nemo.stages import serve

    monkeypatch.delenv("PRISM_NEMO_ROLLOUT_TOKEN", raising=False)
    for host in ("0.0.0.0", "node1", "10.0.0.1", "::"):
        config = load_config("serve", [f"model.path={policy.assets}", f"serve.host={host}", "runtime.device=cpu"])
        with pytest.raises(ConfigError, match="without a token"):
            serve.run(config)  # type: ignore[arg-type]


def test_the_configuration_of_a_replica_is_the_runs_own(policy: PolicyModel, tmp_path: Path) -> None:
    from prism_nemo.config.compose import load_config
    from prism_nemo.config.validate import validate

    with remote_engine(policy, directory=tmp_path):
        config: Any = load_config("serve", config_file=tmp_path / "servers" / "serve.yaml")
        validate(config, world_size=1)
    assert (config.model.path, config.model.precision, config.serve.port) == (str(policy.assets.resolve()), "fp32", 0)
    assert json.dumps(config.rollout.servers.urls) == "[]"


def test_rlvr_over_servers_is_rlvr_in_process(tmp_path: Path) -> None:
    """Every metric and every sample of three steps, to the last digit, where the same prompts are decoded together."""
    steps = "trainer.max_steps=3"
    metrics, samples = written(run_stage("rlvr", tmp_path / "in_process", steps))
    together = ["rollout.servers.prompts_per_request=4", "rollout.servers.weight_bucket_mb=1"]
    served, samples_served = written(run_stage("rlvr", tmp_path / "served", steps, "rollout.placement=separate", *together))
    own = {name for row in served for name in row if name.startswith("servers/")}
    assert own and all(row[name] == 0 for row in served for name in own)
    assert [{name: value for name, value in row.items() if name not in own} for row in served] == metrics
    assert samples_served == samples
    assert (tmp_path / "served" / "servers" / "replica-0.log").exists()
