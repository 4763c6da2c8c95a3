"""Peak memory and exactness of label log-probabilities and their backward pass, beside torch's plain way. Prints JSON.

    OMP_NUM_THREADS=1 python tools/bench/logprobs.py [--tokens 8192] [--vocabulary 151936] [--hidden 256]

Plain: logits of all tokens, `log_softmax`, `gather`, autograd. Ours: `engine.logprobs.label_log_probs`, on one rank and cut over
two tensor-parallel ranks. Each runs in processes of its own; memory is what the process's peak resident set exceeds that before
the inputs were made. The plain way needs about 16 GB at the default size. Everything is fp32, logits have unit variance.
Differences are against the plain way, of log-probabilities and entropies absolute, of gradients relative to the norm; some tokens
of all ways are also held to float64.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WAYS = {"plain": 1, "ours, one rank": 1, "ours, two tensor-parallel ranks": 2}
SAMPLE = 256  # tokens held to float64
Outcome = dict[str, Tensor]


def inputs(tokens: int, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weight, labels, and the gradient that reaches each log-probability."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return states, weight, labels, torch.randn(tokens, generator=generator)


def plain(states: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Outcome:
    log_probs = torch.log_softmax(states @ weight.t(), dim=1)
    with torch.no_grad():
        entropy = torch.stack([-(row.exp() * row).sum() for row in log_probs])
    found = log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)
    (found * upstream).sum().backward()
    return {"log_probs": found.detach(), "entropy": entropy}


def ours(states: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Outcome:
    from prism_nemo.engine.logprobs import label_log_probs

    log_probs, entropy = label_log_probs(states, weight, labels, dist.group.WORLD, with_entropy=True)
    (log_probs * upstream).sum().backward()
    assert entropy is not None
    return {"log_probs": log_probs.detach(), "entropy": entropy}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(way: str, sizes: list[int], file: Path) -> None:
    """Runs one way in this process; its memory and seconds, and on the first rank what it found, go into `file`."""
    import prism_nemo.engine.logprobs  # noqa: F401  its imports are not what is measured

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    before = peak_bytes()
    states, weight, labels, upstream = inputs(*sizes)
    weight = weight.chunk(ranks)[rank].clone()
    states.requires_grad_(), weight.requires_grad_()
    began = time.perf_counter()
    outcome = (plain if way == "plain" else ours)(states, weight, labels, upstream)
    seconds = time.perf_counter() - began
    peak = peak_bytes() - before
    assert states.grad is not None
    assert weight.grad is not None
    parts = [torch.empty_like(weight.grad) for _ in range(ranks)]
    dist.all_gather(parts, weight.grad)
    gradients = {"hidden_gradient": states.grad, "weight_gradient": torch.cat(parts)}
    torch.save({"peak": peak, "seconds": seconds, **(outcome | gradients if rank == 0 else {})}, file)
    dist.destroy_process_group()


def launch(way: str, ranks: int, sizes: list[int], folder: Path) -> dict[str, Any]:
    """What the first rank found; of memory the rank with most."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--measure", way, "--sizes", *map(str, sizes), "--file", str(folder / f"{rank}.pt")]
        processes.append(subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}))
    assert [process.wait() for process in processes] == [0] * ranks, f"{way} failed"
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {**results[0], "peak": max(result["peak"] for result in results)}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    result = {name: float((found[name] - expected[name]).abs().max()) for name in ("log_probs", "entropy")}
    for name in ("hidden_gradient", "weight_gradient"):
        result[name] = float((found[name] - expected[name]).norm() / expected[name].norm())
    return result


def exact_log_probs(sizes: list[int]) -> Tensor:
    """In float64, of the first tokens."""
    states, weight, labels, _ = inputs(*sizes)
    rows = zip(states[:SAMPLE].double().split(32), labels[:SAMPLE].split(32), strict=True)
    wide = weight.double()
    return torch.cat([torch.log_softmax(part @ wide.t(), 1).gather(1, own.unsqueeze(1)).squeeze(1) for part, own in rows])


def compare(sizes: list[int]) -> dict[str, Any]:
    report: dict[str, Any] = dict(zip(("tokens", "vocabulary", "hidden"), sizes, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        found = {way: launch(way, ranks, sizes, Path(folder)) for way, ranks in WAYS.items()}
    exact = exact_log_probs(sizes)
    for way, result in found.items():
        report[way] = {"peak_mib": result["peak"] / 2**20, "seconds": result["seconds"]}
        report[way]["log_probs_from_float64"] = float((result["log_probs"][:SAMPLE].double() - exact).abs().max())
        if way != "plain":
            report[way]["peak_share_of_plain"] = result["peak"] / found["plain"]["peak"]
            report[way]["differences"] = differences(result, found["plain"])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.sizes, options.file)
    else:
        print(json.dumps(compare([options.tokens, options.vocabulary, options.hidden]), indent=2))


if __name__ == "__main__":
    main()
