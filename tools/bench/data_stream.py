"""Streams synthetic `sharegpt` records, shuffled, through encoding and packing: speed, memory, exact resumption. Prints JSON.

    OMP_NUM_THREADS=1 python tools/bench/data_stream.py [--records 1260000] [--encode 60000] [--format jsonl json] [--dir DIR]

Every format is written (about 0.8 kB a record), indexed, opened again, read as a whole epoch in shuffled order, and of `--encode`
records encoded (every second one with a picture) and packed into rows. Resumption: from a random position, every rank of 1, 2
and 4 is a process of its own that opens the data, takes over the state and draws the next batches: they must be those of the
unbroken stream. Every measurement is a process of its own; memory is its peak resident set, and what it holds at one tenth and
at the end. Files are removed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.config.schema import DataConfig, ExperimentConfig, SFTConfig, TrainerConfig
from prism_nemo.data.open import open_stream
from prism_nemo.data.records import Record
from prism_nemo.data.stream import RecordStream

BATCH = 256
IMAGES = 64
QUESTION = "largest minus smallest"
WORDS = ["largest", "smallest", "minus", *"0123456789"]  # of the model's vocabulary
BYTES_A_RECORD = 1000


# The data


def write_model(folder: Path) -> None:
    """The digits task's tokenizer and image processor."""
    from prism_nemo.data.digits_model import write_model_files

    folder.mkdir()
    write_model_files(folder)


def write_data(folder: Path, count: int, formats: list[str]) -> dict[str, Path]:
    from PIL import Image

    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(IMAGES):
        width = int(noise.integers(2, 5)) * 32
        Image.fromarray(noise.integers(0, 256, (32, width, 3), dtype=np.uint8)).save(folder / "images" / f"{number}.png")
    files = {name: folder / f"data.{name}" for name in formats}
    opened = {name: path.open("w", encoding="utf-8") for name, path in files.items()}
    choose = random.Random(0)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(80, 300))) for _ in range(997)]
    for name, file in opened.items():
        file.write("[" if name == "json" else "")
    for number in range(count):
        text = json.dumps(record(number, texts[number % len(texts)]))
        for name, file in opened.items():
            file.write((",\n" if name == "json" and number else "") + text + ("\n" if name == "jsonl" else ""))
    for name, file in opened.items():
        file.write("]\n" if name == "json" else "")
        file.close()
    return files


def record(number: int, response: str) -> dict[str, Any]:
    images = {"images": [f"images/{number % IMAGES}.png"]} if number % 2 else {}
    content = ("<image> " if images else "") + QUESTION
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": response}]
    return {"id": f"s-{number:07d}", "messages": turns, **images, "metadata": {"note": 'é \\ " [' * (number % 7)}}


# What is measured, each in a process of its own


def config_of(options: argparse.Namespace) -> SFTConfig:
    data = DataConfig(
        train=str(options.file),
        cache_dir=str(options.dir / "cache"),
        index_above_mb=0,
        system_prompt="<caption> <think> <answer>",
    )
    data.max_bad_sample_share = 0.0
    return SFTConfig(
        data=data, trainer=TrainerConfig(max_steps=1, global_batch_size=BATCH), experiment=ExperimentConfig(dir="unused")
    )


def index(options: argparse.Namespace) -> dict[str, Any]:
    before = peak_mb()
    began = time.perf_counter()
    stream = open_stream(config_of(options), lambda record: record, required=("response",))
    seconds = time.perf_counter() - began
    return {
        "records": len(stream.records),
        "seconds": round(seconds, 2),
        "mb_per_second": round(options.file.stat().st_size / 2**20 / seconds, 1),
        "peak_mb": peak_mb(),
        "above_imports_mb": round(peak_mb() - before, 1),
    }


def read(options: argparse.Namespace) -> dict[str, Any]:
    """A whole shuffled epoch, without encoding."""
    began = time.perf_counter()
    stream = open_stream(config_of(options), lambda record: None, required=("response",))
    opened = time.perf_counter() - began
    count, total = 0, len(stream.records)
    seen = np.zeros(total, dtype=bool)
    marks = {}
    while stream.consumed_samples < total:
        for one, _ in stream.next_batch():
            seen[int(one.id[2:])] = True
            count += 1
        stream.tally.add(stream.tried, stream.failed, stream.bad)
        if "10%" not in marks and stream.consumed_samples * 10 >= total:
            marks["10%"] = now_mb()
    marks["100%"] = now_mb()
    seconds = time.perf_counter() - began - opened
    assert seen.all(), "an epoch shows every record"
    return {"open_seconds": round(opened, 2), "records_per_second": round(count / seconds), "rss_mb": marks, "peak_mb": peak_mb()}


def packed(options: argparse.Namespace) -> dict[str, Any]:
    """Some of the epoch, encoded and packed."""
    stream = encoded_stream(options)
    rows = tokens = 0
    marks = {}
    began = time.perf_counter()
    limit = min(options.encode, len(stream.records))
    while stream.consumed_samples < limit:
        for row in rows_of(stream.next_batch()):
            rows, tokens = rows + 1, tokens + row.num_tokens
        if "10%" not in marks and stream.consumed_samples * 10 >= limit:
            marks["10%"] = now_mb()
    marks["100%"] = now_mb()
    seconds = time.perf_counter() - began
    assert stream.failed == 0, stream.bad
    count = stream.consumed_samples
    return {
        "records": count,
        "of": len(stream.records),
        "rows": rows,
        "fill": round(tokens / (rows * options.row_tokens), 4),
        "records_per_second": round(count / seconds),
        "rss_mb": marks,
        "peak_mb": peak_mb(),
    }


def draw(options: argparse.Namespace) -> dict[str, Any]:
    """The next two batches of one rank from a position, as hashes of every record's tokens and pixels, and of its rows."""
    stream = encoded_stream(options)
    state = stream.state_dict()
    stream.load_state_dict({**state, **json.loads(options.state)})
    batches = []
    for _ in range(2):
        batch = stream.next_batch(options.rank, options.world_size)
        batches.append(
            {
                one.id: digest_of([group.prompt.input_ids, group.prompt.pixel_values, *[s.tokens for s in group.segments]])
                for one, group in batch
            }
        )
    return {"batches": batches, "state": stream.state_dict()}


def encoded_stream(options: argparse.Namespace) -> RecordStream[Any]:
    from prism_nemo.data.chat import ChatEncoder
    from prism_nemo.packing.groups import Group, Segment

    config = config_of(options)
    encoder = ChatEncoder.from_directory(options.dir / "model", config.data, image_root=None)

    def encode(one: Record) -> Group:
        assert one.response is not None
        return Group(encoder.encode_prompt(one), (Segment(encoder.encode_response(one.response), sample=0),))

    return open_stream(config, encode, required=("response",))


def rows_of(batch: Any) -> Any:
    from prism_nemo.packing.rows import pack_rows

    return pack_rows([group for _, group in batch], max_tokens=4096)


def digest_of(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def peak_mb() -> float:
    return _status("VmHWM")


def now_mb() -> float:
    return _status("VmRSS")


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return round(int(line.split()[1]) / 1024, 1)


# The whole


def child(what: str, options: argparse.Namespace, file: Path, **more: Any) -> Any:
    command = [sys.executable, __file__, "--only", what, "--file", str(file), "--dir", str(options.dir)]
    command += ["--encode", str(options.encode)]
    for name, value in more.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def resumption(options: argparse.Namespace, file: Path, count: int, position: int) -> dict[str, Any]:
    """Whether ranks that start at a position draw what one rank draws that walked there."""
    state = {"consumed_samples": position}
    merged: dict[int, Any] = {}
    for ranks in (1, *options.ranks):
        drawn = [child("draw", options, file, state=json.dumps(state), rank=rank, world_size=ranks) for rank in range(ranks)]
        whole = []
        for number in range(2):
            shares = [list(one["batches"][number].items()) for one in drawn]
            whole.append([shares[place % ranks][place // ranks] for place in range(sum(map(len, shares)))])
        merged[ranks] = {"batches": whole, "state": drawn[0]["state"]}
    unbroken = child("draw", options, file, state=json.dumps({"consumed_samples": position - BATCH}), rank=0, world_size=1)
    follows = list(unbroken["batches"][1].items()) == [tuple(one) for one in merged[1]["batches"][0]]
    return {
        "position": position,
        "of": count,
        "ranks": sorted(merged),
        "equal": follows and all(one == merged[1] for one in merged.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_260_000)
    parser.add_argument("--encode", type=int, default=60_000, help="records that are encoded and packed")
    parser.add_argument("--format", nargs="+", choices=("jsonl", "json"), default=["jsonl", "json"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of ranks that resume, beside one")
    parser.add_argument("--dir", type=Path, help="where the files are made; by default the temporary folder")
    parser.add_argument("--row-tokens", type=int, default=4096, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--state", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world-size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps({"index": index, "read": read, "packed": packed, "draw": draw}[options.only](options)))
        return
    free = shutil.disk_usage(options.dir or tempfile.gettempdir()).free
    needed = options.records * BYTES_A_RECORD * len(options.format)
    if free < 2 * needed:
        raise SystemExit(
            f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free: choose another --dir, or fewer --records"
        )
    with tempfile.TemporaryDirectory(prefix="data-stream-", dir=options.dir) as name:
        options.dir = Path(name)
        print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    write_model(options.dir / "model")
    files = write_data(options.dir, options.records, options.format)
    result: dict[str, Any] = {"records": options.records, "write_seconds": round(time.perf_counter() - began, 1)}
    position = random.Random(options.records).randrange(BATCH, options.records)
    for name, file in files.items():
        result[name] = {
            "gb": round(file.stat().st_size / 1e9, 3),
            "index": child("index", options, file),
            "read an epoch": child("read", options, file),
            "encode and pack": child("packed", options, file),
            "resume": resumption(options, file, options.records, position),
        }
    return result


if __name__ == "__main__":
    main()
