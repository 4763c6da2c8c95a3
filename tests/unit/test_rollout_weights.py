"""Weights on their way to a rollout server: whole, checked, in the right places, or not at all."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout_servers import Host, in_process, policy_of, served_engine, serving
from helpers.tiny import make_prompt, tiny_model
from torch import Tensor

import prism_nemo.rollout.buckets as buckets_module
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.buckets import (
    NUM_SLOTS,
    Assembly,
    BucketBuffer,
    bucket_header,
    checksum,
    map_shared,
    read_pieces,
)
from prism_nemo.rollout.channel import Channel, ChannelClosed
from prism_nemo.rollout.exchange import Address
from prism_nemo.rollout.receiving import UpdateAborted, WeightUpdate
from prism_nemo.rollout.server import EngineHost, Refused
from prism_nemo.rollout.weight_link import Link, Receiver
from prism_nemo.rollout.weight_sync import WeightSender
from prism_nemo.rollout.wire import GenerateRequest, WireError

PROMPTS = (make_prompt([(4, 6), (8, 4)], seed=1), make_prompt([], seed=3, text_length=11))
SAMPLING = SamplingParams(1.0, 1.0, 0, 12, -1, ())
CASES = {"dense": {}, "tied": {"tied": True}, "moe": {"experts": True}, "tied moe": {"experts": True, "tied": True}}


@pytest.fixture(params=["shared memory", "body"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "body":
        monkeypatch.setattr(buckets_module, "SHARED_MEMORY", Path("/nowhere"))
    return request.param


def tensors_of(*, seed: int) -> list[tuple[str, Tensor]]:
    """Smaller and larger than a bucket of one page, of several types, none contiguous in memory where it has two dimensions."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(3,), (70, 40), (1,), (0, 4), (5, 7, 9), (1024,), (1025,), (33,), (90, 91)]
    made = [torch.randn(shape, generator=draw) for shape in shapes]
    made[3:5] = [tensor.bfloat16() for tensor in made[3:5]]
    return [(f"t{index}", t.t().contiguous().t() if t.dim() == 2 else t) for index, t in enumerate(made)]


def through(tensors: list[tuple[str, Tensor]], bucket_bytes: int) -> list[tuple[str, Tensor]]:
    """Packed, and read from the same memory."""
    buffer, assembly, found = BucketBuffer(bucket_bytes), Assembly(), []
    for bucket in buffer.pack(iter(tensors), lambda half: None):
        assert bucket.data.numel() <= buffer.bucket_bytes
        found += [(name, tensor.clone()) for name, tensor in assembly.tensors(read_pieces(bucket_header(bucket), bucket.data))]
    assembly.check_complete()
    buffer.hide()
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 4096, 12000, 1 << 20])
def test_tensors_come_out_of_buckets_as_they_went_in(bucket_bytes: int, transport: str) -> None:
    tensors = tensors_of(seed=1)
    found = through(tensors, bucket_bytes)
    assert [name for name, _ in found] == [name for name, _ in tensors]
    assert all(a.dtype == b.dtype and a.equal(b) for (_, a), (_, b) in zip(found, tensors, strict=True))


@pytest.mark.parametrize("bucket_bytes", [1, 4096, 12000, 1 << 20])
def test_rows_of_large_tensors_come_as_they_lie(bucket_bytes: int) -> None:
    """In order, and only as tensors that are complete where a row is larger than a bucket."""
    tensors = [*tensors_of(seed=2), ("long rows", torch.randn(3, 1200, generator=torch.Generator().manual_seed(3)))]
    buffer, assembly = BucketBuffer(bucket_bytes), Assembly()
    found: dict[str, list[Tensor]] = {name: [] for name, _ in tensors}
    for bucket in buffer.pack(iter(tensors), lambda number: None):
        for rows in assembly.rows(read_pieces(bucket_header(bucket), bucket.data)):
            assert rows.first == sum(len(part) for part in found[rows.name])
            assert rows.shape == dict(tensors)[rows.name].shape
            found[rows.name].append(rows.values.clone())
    assembly.check_complete()
    assert all(torch.cat(found[name]).equal(tensor) for name, tensor in tensors)
    assert len(found["long rows"]) == (2 if bucket_bytes == 12000 else 1)
    assert (len(found["t1"]) > 1) == (bucket_bytes < 70 * 40 * 4)
    buffer.hide()


def test_a_slot_is_packed_again_only_when_it_is_free() -> None:
    """It is asked for before anything is written, with the number of the bucket that it is for."""
    packed: list[tuple[int, bytes]] = []
    asked: list[int] = []
    buffer = BucketBuffer(4096)

    def free(number: int) -> None:
        asked.append(number)
        assert number == len(packed)
        for earlier, content in packed[-NUM_SLOTS:]:  # none of them has been overwritten yet
            at = earlier % NUM_SLOTS * buffer.bucket_bytes
            assert buffer._data[at : at + len(content)].numpy().tobytes() == content

    for bucket in buffer.pack(tensors_of(seed=1), free):
        packed.append((bucket.number, bucket.data.numpy().tobytes()))
    assert asked == [number for number, _ in packed] and len(packed) > 2 * NUM_SLOTS
    buffer.hide()


def test_shared_memory_is_seen_by_its_name_until_it_is_hidden() -> None:
    buffer = BucketBuffer(4096)
    assert buffer.name is not None
    seen = map_shared(buffer.name)
    assert seen is not None
    buffer._data[5] = 77
    assert seen[5] == 77
    name = buffer.name
    buffer.hide()
    buffer.hide()
    assert not list(buckets_module.SHARED_MEMORY.glob(name))
    assert map_shared(name) is None
    assert seen[5] == 77
    buffer.renew()
    assert buffer.name not in (name, None)
    buffer.hide()


@pytest.mark.parametrize("name", ["../etc/passwd", "prism-nemo-1", "prism-nemo-" + "g" * 32, "/etc/passwd", ""])
def test_nothing_else_is_mapped(name: str) -> None:
    with pytest.raises(WireError):
        map_shared(name)


def test_the_checksum_sees_every_changed_bit_and_moved_block() -> None:
    data = torch.randint(0, 256, (50_003,), dtype=torch.uint8)
    whole = checksum(data)
    for place in (0, 1, 4095, 4096, 49_151, 49_152, 50_002):
        for bit in range(8):
            changed = data.clone()
            changed[place] ^= 1 << bit
            assert checksum(changed) != whole
    moved = data.clone()
    moved[:4096], moved[4096:8192] = data[4096:8192], data[:4096]
    assert checksum(moved) != whole
    assert checksum(data[:-1]) != whole


# Into a model


def rollouts(engine: object, version: int) -> list[Rollout]:
    return engine.generate(PROMPTS, SAMPLING, num_rollouts_per_prompt=2, seeds=range(4))  # type: ignore[attr-defined]


def outputs(found: list[Rollout]) -> list[tuple[list[int], list[float]]]:
    return [(rollout.tokens.tolist(), rollout.log_probs.tolist()) for rollout in found]


@pytest.mark.parametrize("case", CASES)
def test_after_twenty_updates_the_engine_is_as_a_fresh_one(case: str, transport: str) -> None:
    """Two sets of weights by turns, in buckets that cut tensors; also the other way round, and to a server that joins late."""
    tiny = tiny_model(**CASES[case])
    policy = policy_of(tiny)
    original = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    other = {name: tensor + 0.01 * tensor.roll(1, dims=-1) for name, tensor in original.items()}
    expected = {}
    for key, weights in (("other", other), ("original", original)):
        fresh = served_engine(tiny)
        fresh.update_weights(weights.items(), 0)
        expected[key] = outputs(rollouts(fresh, 0))
    assert expected["original"] == outputs(in_process(policy, PROMPTS, SAMPLING, 2, at_once=2))
    assert expected["original"] != expected["other"]
    host, late = Host(tiny), Host(tiny)
    sender = WeightSender(bucket_bytes=40_000, timeout_seconds=60.0)
    with serving(host) as url, serving(late) as late_url:
        receivers = [Receiver("one", host.instance, Address(url, None))]
        for version in range(20):
            if version == 15:
                receivers.append(Receiver("late", late.instance, Address(late_url, None)))
            weights = original if version % 2 else other
            assert sender.send(weights.items(), version, receivers).refusals == {}
            assert set(sender._shares.values()) == {transport == "shared memory"}
            if version in (0, 1, 16, 19):
                for served in [host.served, late.served][: len(receivers)]:
                    found = rollouts(served, version)
                    assert outputs(found) == expected["original" if version % 2 else "other"]
                    assert {rollout.weights_version for rollout in found} == {version}
    sender.close()


def test_what_goes_wrong_here_on_the_way_to_a_server_is_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tiny_model())
    sender = WeightSender(bucket_bytes=1 << 16, timeout_seconds=60.0)

    def fail(link: Link, count: int) -> None:
        raise MemoryError("no room")

    with serving(host) as url, monkeypatch.context() as patch:
        patch.setattr(Link, "finish", fail)
        sent = sender.send(policy_of(tiny_model()).hf_tensors(), 3, [Receiver("one", host.instance, Address(url, None))])
    assert sent.refusals["one"].what == "MemoryError: no room"
    sender.close()


def test_a_tied_output_head_is_never_stale() -> None:
    """Its embedding alone is changed: what is sampled changes as it does in a fresh model."""
    tiny = tiny_model(tied=True)
    policy = policy_of(tiny)
    engine = served_engine(tiny)
    engine.update_weights(policy.hf_tensors(), 0)
    before = outputs(rollouts(engine, 0))
    name = "model.language_model.embed_tokens.weight"
    changed = {key: tensor.clone() for key, tensor in policy.hf_tensors()}
    assert "lm_head.weight" not in changed
    changed[name] = changed[name].roll(1, dims=0)
    engine.update_weights(changed.items(), 1)
    fresh = served_engine(tiny)
    fresh.update_weights(changed.items(), 1)
    assert outputs(rollouts(engine, 1)) == outputs(rollouts(fresh, 1)) != before
    with pytest.raises(RolloutError, match=r"`lm_head\.weight` is none of the model's"):
        engine.update_weights([*changed.items(), ("lm_head.weight", changed[name])], 2)


@pytest.mark.parametrize("case", ["dense", "moe"])
def test_every_parameter_is_filled_or_it_is_an_error(case: str) -> None:
    tiny = tiny_model(**CASES[case])
    weights = {name: tensor.clone() for name, tensor in policy_of(tiny).hf_tensors()}
    engine = served_engine(tiny)
    for parameter in engine._model.parameters():
        parameter.data.fill_(float("nan"))
    engine.update_weights(weights.items(), 0)
    assert all(bool(parameter.isfinite().all()) for parameter in engine._model.parameters())
    names = list(weights)
    for left_out in (names[0], names[len(names) // 2], names[-1]):
        with pytest.raises(RolloutError, match=r"1 of .* weights did not come"):
            engine.update_weights([(name, weights[name]) for name in names if name != left_out], 1)
    with pytest.raises(RolloutError, match="came twice"):
        engine.update_weights([*weights.items(), (names[0], weights[names[0]])], 1)
    with pytest.raises(RolloutError, match="has shape"):
        engine.update_weights([(names[0], weights[names[0]][:1])], 1)


# Updates that go wrong


def request(update_id: str) -> GenerateRequest:
    return GenerateRequest("1", update_id, PROMPTS, SAMPLING, 2, range(4))


class Update:
    """A run's end of one update, frame by frame; the outcome is what `EngineHost.receive` gave or raised."""

    def __init__(self, host: EngineHost, update_id: str, version: int = 1, shared: str | None = None) -> None:
        here, there = socket.socketpair()
        self.channel = Channel(here)
        self._executor = ThreadPoolExecutor(1)
        served = Channel(there, max_body_bytes=1 << 24)
        self._outcome = self._executor.submit(host.receive, served, "127.0.0.1")
        self._outcome.add_done_callback(lambda _: served.shut_down())
        self._sockets = here, there
        self.channel.send({"update_id": update_id, "version": version})
        try:
            self.told = self.channel.receive(seconds=60)[0]
            self.channel.send({"shared": shared})
            self.ready = self.channel.receive(seconds=60)[0]
        except ChannelClosed:
            pass

    def send(self, header: dict[str, Any], data: Tensor | None) -> None:
        """A bucket, and waits until it is read. Raises ChannelClosed or WireError where it is not."""
        self.channel.send(header, data)
        frame, _ = self.channel.receive(seconds=60)
        assert frame == {"read": header["number"]}

    def send_all(self, tensors: list[tuple[str, Tensor]], limit: int = 10**6) -> int:
        count = 0
        for header, data in packed(tensors, 1 << 16)[:limit]:
            self.send(header, data)
            count += 1
        return count

    def finish(self, count: int) -> dict[str, Any]:
        with contextlib.suppress(ChannelClosed):
            self.channel.send({"num_buckets": count})
        return self.outcome()

    def outcome(self) -> dict[str, Any]:
        try:
            return self._outcome.result(timeout=60)
        finally:
            self.hang_up()

    def hang_up(self) -> None:
        for one in self._sockets:
            one.close()
        self._executor.shutdown(wait=False)


def packed(tensors: list[tuple[str, Tensor]], bucket_bytes: int) -> list[tuple[dict[str, Any], Tensor]]:
    buffer = BucketBuffer(bucket_bytes)
    try:
        return [(bucket_header(bucket), bucket.data.clone()) for bucket in buffer.pack(tensors, lambda number: None)]
    finally:
        buffer.hide()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host(tiny_model())
    update = Update(host, "first", 0)
    assert update.told["instance"] == host.instance
    assert update.finish(update.send_all(list(policy_of(tiny_model()).hf_tensors()))) == {"version": 0}
    yield host
    host.close(5.0)


def test_a_part_of_an_update_is_not_generated_from(host: Host) -> None:
    assert host.generate(request("first"), lambda: True)
    second = Update(host, "second")
    for update_id in ("first", "second"):
        with pytest.raises(Refused, match="does not have these weights"):
            host.generate(request(update_id), lambda: True)
    weights = list(policy_of(tiny_model()).hf_tensors())
    sent = second.send_all(weights, limit=3)
    for update_id in ("first", "second"):
        with pytest.raises(Refused, match="does not have these weights"):
            host.generate(request(update_id), lambda: True)
    with pytest.raises(WireError, match="3 buckets came, 4 were sent"):
        second.finish(sent + 1)
    assert host.health()["version"] is None
    third = Update(host, "third")  # the run that began it is gone
    fourth = Update(host, "fourth")
    with pytest.raises(Refused, match="another update was begun"):
        third.outcome()
    assert host.health()["version"] is None
    assert fourth.finish(fourth.send_all(weights)) == {"version": 1}
    assert host.generate(request("fourth"), lambda: True)
    with pytest.raises(Refused, match="does not have these weights"):
        host.generate(request("third"), lambda: True)


@pytest.mark.parametrize("sent", [0, 2])
def test_a_run_that_goes_away_leaves_no_weights(host: Host, sent: int) -> None:
    weights = list(policy_of(tiny_model()).hf_tensors())
    update = Update(host, "second")
    update.send_all(weights, limit=sent)
    update.channel.shut_down()
    with pytest.raises(UpdateAborted):
        update.outcome()
    with pytest.raises(Refused, match="does not have these weights"):
        host.generate(request("second"), lambda: True)
    again = Update(host, "third")
    again.finish(again.send_all(weights))
    assert host.generate(request("third"), lambda: True)


def test_a_run_that_says_nothing_is_given_up_for_the_next(host: Host) -> None:
    """Even before it has said how the bytes travel."""
    here, there = socket.socketpair()
    silent = Channel(here)
    with ThreadPoolExecutor(1) as executor:
        outcome = executor.submit(host.receive, Channel(there), "127.0.0.1")
        silent.send({"update_id": "second", "version": 1})
        silent.receive(seconds=60)
        update = Update(host, "third")
        with pytest.raises((Refused, ChannelClosed)):
            outcome.result(timeout=60)
    update.finish(update.send_all(list(policy_of(tiny_model()).hf_tensors())))
    assert host.generate(request("third"), lambda: True)
    here.close(), there.close()


def test_weights_that_are_missing_at_the_end_leave_none(host: Host) -> None:
    weights = list(policy_of(tiny_model()).hf_tensors())
    update = Update(host, "second")
    with pytest.raises(RolloutError, match="did not come"):
        update.finish(update.send_all(weights[:-1]))
    with pytest.raises(Refused):
        host.generate(request("second"), lambda: True)


DAMAGE = ["bit", "checksum", "order", "twice", "outside", "type", "gap", "no checksum", "negative", "rows twice", "too long"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bucket_ends_the_update(host: Host, damage: str) -> None:
    update = Update(host, "second")
    buckets = packed(list(policy_of(tiny_model()).hf_tensors()), 1 << 12)
    header, data = buckets[0]
    if damage == "bit":
        data[17] ^= 4
    elif damage == "checksum":
        header["checksum"] ^= 1
    elif damage == "order":
        header = buckets[1][0]
    elif damage == "twice":
        update.send(header, data)
    elif damage == "outside":
        header["pieces"][0][5] += 1 << 20
    elif damage == "type":
        header["pieces"][0][1] = "int8"
    elif damage == "gap":
        part = next(index for index, (one, _) in enumerate(buckets) if one["pieces"][0][3] > 0)
        header, data = {**buckets[part][0], "number": 0}, buckets[part][1]
    elif damage == "no checksum":
        del header["checksum"]
    elif damage == "negative":
        header["pieces"][0][4] = -64
    elif damage == "rows twice":
        part = next(index for index, (one, _) in enumerate(buckets) if one["pieces"][0][3] > 0)
        for before in range(part + 1):
            update.send(*buckets[before])
        header, data = {**buckets[part][0], "number": part + 1}, buckets[part][1]
    else:
        header, data = {**header, "body": (1 << 24) + 1}, None
    with pytest.raises(ChannelClosed):
        update.send(header, data)
    with pytest.raises(WireError):
        update.outcome()
    with pytest.raises(Refused):
        host.generate(request("first"), lambda: True)


@pytest.mark.parametrize("at, size", [(0, 1 << 30), (-1, 5), (5, -1), (0, None), ("0", 5), (True, 5)])
def test_nothing_beside_the_shared_memory_is_read(host: Host, at: object, size: object) -> None:
    buffer = BucketBuffer(1 << 12)
    update = Update(host, "second", shared=buffer.name)
    assert update.ready["shares"] is True
    header, _ = packed(tensors_of(seed=1), 1 << 12)[0]
    with pytest.raises(ChannelClosed):
        update.send({**header, "at": at, "size": size}, torch.empty(0, dtype=torch.uint8))
    with pytest.raises(WireError, match="does not lie within the shared memory"):
        update.outcome()
    buffer.hide()


def test_bytes_that_change_in_shared_memory_are_seen(host: Host) -> None:
    """As if a slot had been packed again before it was read."""
    buffer = BucketBuffer(1 << 16)
    update = Update(host, "second", shared=buffer.name)
    bucket = next(iter(buffer.pack(list(policy_of(tiny_model()).hf_tensors()), lambda number: None)))
    bucket.data[1000] ^= 1
    header = {**bucket_header(bucket), "at": bucket.at, "size": bucket.data.numel()}
    with pytest.raises(ChannelClosed):
        update.send(header, torch.empty(0, dtype=torch.uint8))
    with pytest.raises(WireError, match="checksum differs"):
        update.outcome()
    buffer.hide()


@pytest.mark.parametrize("first", [{}, {"update_id": 3, "version": 1}, {"update_id": "a", "version": "1"}])
def test_what_is_no_begin_changes_nothing(host: Host, first: dict[str, Any]) -> None:
    here, there = socket.socketpair()
    with here, there, ThreadPoolExecutor(1) as executor:
        outcome = executor.submit(host.receive, Channel(there), "127.0.0.1")
        Channel(here).send(first)
        with pytest.raises(WireError):
            outcome.result(timeout=60)
    assert host.generate(request("first"), lambda: True)


def test_an_update_waits_for_what_is_generated(host: Host) -> None:
    """And says so when it waits too long."""
    host._busy_seconds = 0.2
    host._gate.enter(lambda: None)
    with pytest.raises(Refused, match="1 requests are still being generated"):
        Update(host, "second").outcome()
    host._gate.leave()
    update = Update(host, "third")
    update.finish(update.send_all(list(policy_of(tiny_model()).hf_tensors())))


def test_a_request_whose_client_has_gone_is_not_generated(host: Host) -> None:
    with pytest.raises(Refused, match="nobody"):
        host.generate(request("first"), lambda: False)


class _Impatient:
    """Reads two tensors and no more, or raises."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        next(tensors), next(tensors)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, RolloutError("no"), MemoryError("no")])
def test_an_engine_that_ends_early_is_noticed(error: Exception | None) -> None:
    here, there = socket.socketpair()
    with here, there, ThreadPoolExecutor(1) as executor:
        channel = Channel(here)
        update = WeightUpdate(_Impatient(error), executor, "a", 1, Channel(there, max_body_bytes=1 << 20), Assembly())
        update.start(lambda: (lambda header, body, channel: body, {}))
        ((header, data),) = packed(tensors_of(seed=1), 1 << 20)
        channel.send(header, data)
        with pytest.raises(WireError if error is None else type(error), match="left weights unread" if error is None else "no"):
            update.wait()
        update.abort()
