"""What conversion costs: a 2B-shaped model from the Hub's layout to a checkpoint and back, beside `cp -r`. Prints JSON.

    python tools/bench/convert.py [--directory DIR] [--repeats 3] [--layers 28] [--shard-bytes 1000000000]

Every step is a process of its own, started through the command line, and its time is the whole process's; import and export have
their files on disk when they end, `cp` does not. Ratios are of the medians, and of each one's best round, which says more on a
machine that does other work too (`load` is the machine's, before and after a round). Memory is the largest resident set
(`ru_maxrss`) above that of a Python that does nothing. (A child's count begins with its parent's, so that this process itself
imports nothing large: it writes and compares in processes of their own too.) Needs three times the model's size on the disk of
DIR (4.3 GB in bfloat16); the copies are removed. Nothing is dropped from the page cache: all read what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

NOISE_BYTES = 1 << 26


def config_of(layers: int) -> dict[str, Any]:
    """config.json of Qwen3-VL-2B, with fewer language layers where asked."""
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "dtype": "bfloat16",
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "deepstack_visual_indexes": [5, 11, 17],
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": 2048,
        "num_position_embeddings": 2304,
    }
    tokens = {"image_token_id": 151655, "video_token_id": 151656}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": True, **tokens}


def write_model(directory: Path, layers: int, shard_bytes: int) -> int:
    """A HuggingFace directory of random bfloat16 weights in several files; returns its bytes."""
    import torch

    from prism_nemo.convert.pieces import memory_of
    from prism_nemo.convert.qwen3_vl import hf_shapes

    directory.mkdir()
    config = config_of(layers)
    (directory / "config.json").write_text(json.dumps(config))
    noise = memory_of(torch.randn(NOISE_BYTES // 2, generator=torch.Generator().manual_seed(0)).bfloat16())
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in hf_shapes(config).items():
        if size + 2 * prod(shape) > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * prod(shape)
    weight_map, total, start = {}, 0, 0
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for tensor, shape in tensors:
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + 2 * prod(shape)]}
            position += 2 * prod(shape)
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            while position:
                count = min(position, NOISE_BYTES - start)
                file.write(noise[start : start + count])
                position -= count
                start = (start + count + 7919) % (NOISE_BYTES // 2)  # no two tensors alike
        total += (directory / name).stat().st_size
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds and peak resident MB of a whole process."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return {
        "seconds": round(time.monotonic() - began, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024, 1),
    }


def same_weights(one: Path, other: Path) -> bool:
    from prism_nemo.convert.hf_reader import HFReader
    from prism_nemo.convert.pieces import byte_chunks

    with HFReader(one) as first, HFReader(other) as second:
        if first.names != second.names:
            return False
        for name in first.names:
            rows = first.shape(name)[0]
            if (first.shape(name), first.dtype(name)) != (second.shape(name), second.dtype(name)):
                return False
            step = max(1, (1 << 20) // max(1, 2 * prod(first.shape(name)[1:])))
            for start in range(0, rows, step):
                end = min(rows, start + step)
                blocks = (
                    b"".join(bytes(chunk) for chunk in byte_chunks(reader.pieces(name, start, end), reader.io))
                    for reader in (first, second)
                )
                if next(blocks) != next(blocks):
                    return False
    return True


def run(directory: Path, repeats: int, layers: int, shard_bytes: int) -> dict[str, Any]:
    model, copy, checkpoint, exported = (directory / name for name in ("model", "copy", "checkpoint", "exported"))
    script = [sys.executable, __file__]
    subprocess.run([*script, "--write", str(model), "--layers", str(layers), "--shard-bytes", str(shard_bytes)], check=True)
    size = sum(file.stat().st_size for file in model.iterdir())
    os.sync()
    prism = [sys.executable, "-m", "prism_nemo", "convert"]
    commands = {
        "cp": ["cp", "-r", str(model), str(copy)],
        "import": [*prism, "import", "--hf", str(model), "--out", str(checkpoint)],
        "export": [*prism, "export", "--checkpoint", str(checkpoint), "--out", str(exported)],
    }

    def step(name: str) -> dict[str, float]:
        figures = measured(commands[name])
        os.sync()  # what one step left to write is not the next one's
        if name == "cp":
            shutil.rmtree(copy)
        return figures

    baseline = measured([sys.executable, "-c", "pass"])
    rounds: list[dict[str, Any]] = []
    equal = True
    for _ in range(repeats):
        # A cp before each of the two: all three then write into memory that the machine has just given back.
        load = [round(os.getloadavg()[0], 2)]
        figures: dict[str, Any] = {f"{number} {name}": step(name) for number, name in enumerate(("cp", "import", "cp", "export"))}
        figures["load"] = [*load, round(os.getloadavg()[0], 2)]
        equal = equal and subprocess.run([*script, "--compare", str(model), str(exported)], check=False).returncode == 0
        shutil.rmtree(checkpoint)
        shutil.rmtree(exported)
        rounds.append(figures)
    by_name = {name: [row for figures in rounds for key, row in figures.items() if key.endswith(name)] for name in commands}
    seconds = {name: [row["seconds"] for row in rows] for name, rows in by_name.items()}
    peaks = {name: max(row["peak_mb"] for row in by_name[name]) - baseline["peak_mb"] for name in ("import", "export")}
    return {
        "model_gb": round(size / 1e9, 3),
        "bit_equal": equal,
        "interpreter": baseline,
        "median": compared({name: statistics.median(times) for name, times in seconds.items()}),
        "best": compared({name: min(times) for name, times in seconds.items()}),
        "peak_mb_above_interpreter": {name: round(peak, 1) for name, peak in peaks.items()},
        "rounds": rounds,
    }


def compared(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of each command, and how many times as long as `cp` both conversions take, each and together."""
    result = dict(seconds)
    for name, time_of in (
        ("import", seconds["import"]),
        ("export", seconds["export"]),
        ("both", seconds["import"] + seconds["export"]),
    ):
        result[f"{name}_over_cp"] = time_of / seconds["cp"]
    return {name: round(value, 2) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compare", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write_model(options.write, options.layers, options.shard_bytes)
        return
    if options.compare is not None:
        sys.exit(0 if same_weights(*options.compare) else 1)
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=options.directory) as folder:
        print(json.dumps(run(Path(folder), options.repeats, options.layers, options.shard_bytes), indent=1))


if __name__ == "__main__":
    main()
