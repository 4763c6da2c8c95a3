"""Weights on their way to a rollout server: whole, checked, in the right places, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.rollout_servers import Host, in_process, policy_of, served_engine, serving
from helpers.tiny import make_prompt, tiny_model
from torch import Tensor

import prism_nemo.rollout.buckets as buckets_module
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.buckets import Assembly, BucketBuffer, checksum, map_shared, piece_header, read_pieces
from prism_nemo.rollout.exchange import Address
from prism_nemo.rollout.receiving import WeightUpdate
from prism_nemo.rollout.server import Refused
from prism_nemo.rollout.weight_sync import BodyTransport, Receiver, WeightSender
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
        found += [(name, tensor.clone()) for name, tensor in assembly.add(read_pieces(piece_header(bucket), bucket.data))]
    assembly.check_complete()
    buffer.hide()
    return found


@pytest.mark.parametrize("bucket_bytes", [1, 4096, 12000, 1 << 20])
def test_tensors_come_out_of_buckets_as_they_went_in(bucket_bytes: int, transport: str) -> None:
    tensors = tensors_of(seed=1)
    found = through(tensors, bucket_bytes)
    assert [name for name, _ in found] == [name for name, _ in tensors]
    assert all(a.dtype == b.dtype and a.equal(b) for (_, a), (_, b) in zip(found, tensors, strict=True))


def test_a_half_is_packed_again_only_when_it_is_free() -> None:
    packed: list[int] = []
    freed: list[int] = []

    def free(half: int) -> None:
        freed.append(half)
        assert len(packed) == len(freed) - 1

    for bucket in BucketBuffer(4096).pack(tensors_of(seed=1), free):
        packed.append(bucket.number % 2)
    assert packed == freed and len(packed) > 6


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


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host(tiny_model())
    policy = policy_of(tiny_model())
    host.begin({"update_id": "first", "version": 0, "shared": None})
    count = send_buckets(host, "first", list(policy.hf_tensors()))
    host.finish({"update_id": "first", "num_buckets": count})
    yield host
    host.close(5.0)


def send_buckets(host: Host, update_id: str, tensors: list[tuple[str, Tensor]], limit: int = 10**6) -> int:
    count = 0
    for bucket in BucketBuffer(1 << 16).pack(tensors, lambda half: None):
        if count == limit:
            break
        _, (data,) = BodyTransport().parts(bucket)
        host.take({"update_id": update_id, **piece_header(bucket)}, torch.frombuffer(bytearray(data), dtype=torch.uint8))
        count += 1
    return count


def test_a_part_of_an_update_is_not_generated_from(host: Host) -> None:
    assert host.generate(request("first"), lambda: True)
    host.begin({"update_id": "second", "version": 1, "shared": None})
    for update_id in ("first", "second"):
        with pytest.raises(Refused, match="does not have these weights"):
            host.generate(request(update_id), lambda: True)
    weights = list(policy_of(tiny_model()).hf_tensors())
    sent = send_buckets(host, "second", weights, limit=3)
    for update_id in ("first", "second"):
        with pytest.raises(Refused, match="does not have these weights"):
            host.generate(request(update_id), lambda: True)
    with pytest.raises(WireError, match="3 buckets came, 4 were sent"):
        host.finish({"update_id": "second", "num_buckets": sent + 1})
    with pytest.raises(Refused, match="not under way"):
        host.finish({"update_id": "second", "num_buckets": sent})
    assert host.health()["version"] is None
    host.begin({"update_id": "third", "version": 1, "shared": None})
    host.begin({"update_id": "fourth", "version": 1, "shared": None})  # the run that began the third is gone
    with pytest.raises(Refused, match="not under way"):
        send_buckets(host, "third", weights)
    host.finish({"update_id": "fourth", "num_buckets": send_buckets(host, "fourth", weights)})
    assert host.generate(request("fourth"), lambda: True)


def test_weights_that_are_missing_at_the_end_leave_none(host: Host) -> None:
    weights = list(policy_of(tiny_model()).hf_tensors())
    host.begin({"update_id": "second", "version": 1, "shared": None})
    count = send_buckets(host, "second", weights[:-1])
    with pytest.raises(RolloutError, match="did not come"):
        host.finish({"update_id": "second", "num_buckets": count})
    with pytest.raises(Refused):
        host.generate(request("second"), lambda: True)


@pytest.mark.parametrize("damage", ["bit", "order", "twice", "outside", "type", "gap", "no memory"])
def test_a_damaged_bucket_ends_the_update(host: Host, damage: str) -> None:
    weights = list(policy_of(tiny_model()).hf_tensors())
    host.begin({"update_id": "second", "version": 1, "shared": None})
    buffer = BucketBuffer(1 << 12)
    packed = [(piece_header(bucket), bucket.data.clone()) for bucket in buffer.pack(weights, lambda half: None)]
    buffer.hide()
    header, data = packed[0]
    if damage == "bit":
        data[17] ^= 4
    elif damage == "order":
        header = packed[1][0]
    elif damage == "twice":
        host.take({"update_id": "second", **header}, data)
    elif damage == "outside":
        header["pieces"][0][5] += 1 << 20
    elif damage == "type":
        header["pieces"][0][1] = "int8"
    elif damage == "gap":
        part = next(index for index, (one, _) in enumerate(packed) if one["pieces"][0][3] > 0)
        header, data = {**packed[part][0], "number": 0}, packed[part][1]
    else:
        header["at"], header["size"] = 0, 10
    with pytest.raises(WireError):
        host.take({"update_id": "second", **header}, data)
    with pytest.raises(Refused):
        host.generate(request("first"), lambda: True)


def test_an_update_waits_for_what_is_generated(host: Host) -> None:
    """And says so when it waits too long."""
    host._busy_seconds = 0.2
    host._gate.enter(lambda: None)
    with pytest.raises(Refused, match="1 requests are still being generated"):
        host.begin({"update_id": "second", "version": 1, "shared": None})
    host._gate.leave()
    host.begin({"update_id": "second", "version": 1, "shared": None})


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
    with ThreadPoolExecutor(1) as executor:
        update = WeightUpdate(_Impatient(error), executor, "a", 1, shared=None, assembly=Assembly())
        (bucket,) = BucketBuffer(1 << 20).pack(tensors_of(seed=1), lambda half: None)
        with pytest.raises(WireError if error is None else type(error), match="stopped reading" if error is None else "no"):
            update.take(piece_header(bucket), bucket.data)
        update.abort()
