"""Weights by a process group of run and servers (gloo, on the CPU): servers that die, freeze, join and leave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.rollout_servers import Host, assert_bit_equal, in_process, members, pid_of, policy_of, remote_engine, serving, until
from helpers.tiny import IMAGE_TOKEN, make_prompt, tiny_model
from torch import Tensor

from prism_nemo.config.enums import WeightTransport
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import RolloutError, SamplingParams
from prism_nemo.rollout.exchange import Address
from prism_nemo.rollout.weight_group import GroupInvitation, Rendezvous
from prism_nemo.rollout.weight_link import Link, Receiver
from prism_nemo.rollout.weight_sync import WeightSender
from prism_nemo.rollout.wire import WireError

PROMPTS = (make_prompt([(4, 6)], seed=1), make_prompt([], seed=2))
SAMPLING = SamplingParams(1.0, 1.0, 0, 8, -1, (IMAGE_TOKEN,))
GROUP = WeightTransport.process_group

pytestmark = pytest.mark.usefixtures("events")


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return policy_of(tiny_model())


class Disturbed:
    """The policy's tensors; when half of them have been read for the first time, `harm()`."""

    def __init__(self, policy: PolicyModel, harm: Callable[[], None]) -> None:
        self._tensors = policy.hf_tensors()
        self._half = sum(1 for _ in self._tensors) // 2
        self._harm: Callable[[], None] | None = harm

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(self._tensors):
            if index == self._half and self._harm is not None:
                harm, self._harm = self._harm, None
                harm()
            yield pair


def test_servers_that_die_and_freeze_in_the_midst_of_an_update(
    policy: PolicyModel, tmp_path: Path, events: pytest.LogCaptureFixture
) -> None:
    """Those left get the weights, and are not started again for what the others did; who is back is in the next group."""

    def check(version: int) -> None:
        found = engine.generate(PROMPTS, SAMPLING, num_rollouts_per_prompt=1, seeds=range(2))
        assert_bit_equal(found, in_process(policy, PROMPTS, SAMPLING, 1, version=version))

    def both_are_up() -> bool:
        return engine._fleet is not None and len(engine._fleet.up()) == 2

    with remote_engine(policy, directory=tmp_path, num_replicas=2, weight_transport=GROUP, control_timeout_seconds=8.0) as engine:
        assert engine._sender is not None
        engine._sender._bucket_bytes = 1 << 14  # so that an update has many
        first, second = members(engine)
        for harm, victim, other in ((signal.SIGKILL, first, second), (signal.SIGSTOP, second, first)):
            until(both_are_up)
            engine.update_weights(policy.hf_tensors(), 0)
            group = engine._sender._group
            engine.update_weights(policy.hf_tensors(), 1)
            assert group is not None and engine._sender._group is group and group.size == 3
            check(1)
            pid, kept = pid_of(victim), pid_of(other)
            engine.update_weights(Disturbed(policy, lambda pid=pid, harm=harm: os.kill(pid, harm)), 2)
            assert f"{victim.name} did not get the weights of version 2" in events.text
            check(2)
            assert pid_of(other) == kept
            until(lambda victim=victim, pid=pid: pid_of(victim) != pid)
            events.clear()
        until(both_are_up)
        engine.update_weights(policy.hf_tensors(), 3)
        assert engine._sender._group is not None and engine._sender._group.size == 3
        check(3)
    assert "weights travel by" not in events.text  # which was told once, at the start


def test_a_server_that_joins_and_one_that_leaves(policy: PolicyModel) -> None:
    one, other = Host(tiny_model()), Host(tiny_model())
    sender = WeightSender(bucket_bytes=1 << 14, timeout_seconds=60.0, transport=GROUP)
    with serving(one) as url, serving(other) as other_url:
        both = [Receiver("one", one.instance, Address(url, None)), Receiver("other", other.instance, Address(other_url, None))]
        for version, receivers in enumerate((both[:1], both, both, both[1:], [])):
            assert sender.send(policy.hf_tensors(), version, receivers).refusals == {}
            assert [one.health()["version"], other.health()["version"]] == [[0, None], [1, 1], [2, 2], [2, 3], [2, 3]][version]
    sender.close()


def test_a_server_that_has_left_the_group_by_itself_is_in_the_next(policy: PolicyModel) -> None:
    """Another run has updated it meanwhile, or it failed: the group is formed again."""
    host = Host(tiny_model())
    sender = WeightSender(bucket_bytes=1 << 14, timeout_seconds=60.0, transport=GROUP)
    with serving(host) as url:
        receivers = [Receiver("one", host.instance, Address(url, None))]
        assert sender.send(policy.hf_tensors(), 0, receivers).refusals == {}
        host._inlet.close()
        refusal = sender.send(policy.hf_tensors(), 1, receivers).refusals["one"]
        assert "not in that process group" in refusal.what and not refusal.at_fault
        assert sender.send(policy.hf_tensors(), 2, receivers).refusals == {}
    sender.close()


# A transport that is named and cannot be had


def test_shared_memory_that_cannot_be_mapped_is_an_error(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_nemo.rollout.buckets.SHARED_MEMORY", Path("/nowhere"))
    named = WeightTransport.shared_memory
    with serving(Host(tiny_model())) as url, remote_engine(policy, [url], weight_transport=named) as engine:
        with pytest.raises(RolloutError, match="cannot map the run's shared memory") as raised:
            engine.update_weights(policy.hf_tensors(), 0)
        assert "rollout.servers.weight_transport=auto" in str(raised.value.remedy)


def test_a_group_over_different_devices_is_an_error(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_nemo.rollout.server.backend_of", lambda device: "nccl")
    with serving(Host(tiny_model())) as url, remote_engine(policy, [url], weight_transport=GROUP) as engine:
        with pytest.raises(RolloutError, match="another kind of device") as raised:
            engine.update_weights(policy.hf_tensors(), 0)
        assert "rollout.servers.weight_transport=auto" in str(raised.value.remedy)


def test_a_group_of_two_builds_is_only_for_who_names_it(
    policy: PolicyModel, events: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prism_nemo.rollout.server.libraries_of", lambda device: "torch 2.0")
    with serving(Host(tiny_model())) as url, remote_engine(policy, [url], weight_transport=GROUP) as engine:
        for version in range(2):
            engine.update_weights(policy.hf_tensors(), version)
    told = [line for line in events.messages if "has torch 2.0, the run torch" in line]
    assert len(told) == 1 and "may fail or hang" in told[0]


@pytest.mark.parametrize(
    ("device", "libraries", "in_group"), [("GPU-2", "NCCL 2", True), ("GPU-2", "NCCL 1", False), ("GPU-1", "NCCL 2", False)]
)
def test_auto_takes_a_group_between_gpus_of_their_own_and_equal_builds(
    device: str, libraries: str, in_group: bool, events: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is on GPU-1 with NCCL 2; nothing is sent, so that no GPU is needed."""
    monkeypatch.setattr("prism_nemo.rollout.weight_sync.identity_of", lambda device: "GPU-1")
    monkeypatch.setattr("prism_nemo.rollout.weight_sync.libraries_of", lambda device: "NCCL 2")
    link = Link(Receiver("one", "a", Address("http://127.0.0.1:9", None)), "update", 1.0)
    link.device, link.backend, link.libraries = device, "nccl", libraries
    sender = WeightSender(bucket_bytes=1, timeout_seconds=1.0, device=torch.device("cuda"))
    assert sender._in_group([link]) is in_group
    assert ("one has NCCL 1, the run NCCL 2: weights do not travel in a process group" in events.text) is (libraries == "NCCL 1")
    assert link.refusal is None
    link.close()


@pytest.mark.parametrize("named", [WeightTransport.body, WeightTransport.shared_memory, GROUP, WeightTransport.auto])
def test_the_transport_that_is_used_is_told_once(
    policy: PolicyModel, named: WeightTransport, events: pytest.LogCaptureFixture
) -> None:
    with serving(Host(tiny_model())) as url, remote_engine(policy, [url], weight_transport=named) as engine:
        for version in range(3):
            engine.update_weights(policy.hf_tensors(), version)
    used = WeightTransport.shared_memory if named is WeightTransport.auto else named
    assert [line for line in events.messages if line.startswith("weights travel by")] == [f"weights travel by {used}"]


# Strangers


def invitation() -> GroupInvitation:
    return GroupInvitation("a", "b", "gloo", "127.0.0.1", 9, 1, 2, 4096, 1.0)


def test_an_invitation_is_read_as_it_was_written() -> None:
    assert GroupInvitation.read(invitation().header()) == invitation()


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"rank": 2}, {"port": 0}, {"port": "9"}, {"bucket_bytes": 1 << 50}, {"seconds": -1}, {"host": 5}, {"more": 1}],
)
def test_nonsense_is_no_invitation(change: dict[str, object]) -> None:
    with pytest.raises(WireError):
        GroupInvitation.read({**invitation().header(), **change})
    with pytest.raises(WireError):
        GroupInvitation.read(None)


def test_the_store_listens_where_the_servers_are() -> None:
    """On the one address by which all of them see the run, or on all where there are several."""
    local, everywhere = Rendezvous(["127.0.0.1", "127.0.0.1"], 5.0), Rendezvous(["127.0.0.1", "10.0.0.1"], 5.0)
    assert local._listener.getsockname()[0] == "127.0.0.1"
    assert everywhere._listener.getsockname()[0] == "0.0.0.0"
    for one in (local, everywhere):
        one._listener.close()


def test_a_run_that_goes_away_frees_the_server(policy: PolicyModel) -> None:
    """It waits in a broadcast for bytes that do not come; the next update ends that at once."""
    host = Host(tiny_model())
    with serving(host) as url:
        receivers = [Receiver("one", host.instance, Address(url, None))]

        def silent() -> Iterator[tuple[str, Tensor]]:
            yield from list(policy.hf_tensors())[:20]
            raise KeyboardInterrupt

        sender = WeightSender(bucket_bytes=1 << 12, timeout_seconds=600.0, transport=GROUP)
        with pytest.raises(KeyboardInterrupt):
            sender.send(silent(), 0, receivers)
        began = time.monotonic()
        again = WeightSender(bucket_bytes=1 << 12, timeout_seconds=600.0, transport=GROUP)
        assert again.send(policy.hf_tensors(), 1, receivers).refusals == {}
        assert time.monotonic() - began < 300.0  # far below the limit
        assert host.health()["version"] == 1
        sender.close(), again.close()
