"""What hashes cost: a folder of random bytes is written as checkpoints are, sealed with sizes alone and with hashes, and checked.

    python tools/bench/checkpoint_hashes.py --gib 2

Prints JSON: seconds, and GiB/s of this process (ranks share a checkpoint's files, so more ranks on more nodes are quicker).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prism_nemo.convert.manifest import THREADS, hash_files, problems, seal


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write(folder: Path, gib: float, files: int) -> None:
    block = os.urandom(64 << 20)
    for number in range(files):
        with (folder / f"__{number}_0.distcp").open("wb") as file:
            left = int(gib * (1 << 30) / files)
            while left > 0:
                left -= file.write(block[:left])
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        seconds = {"write_and_fsync": seconds_of(lambda: write(folder, options.gib, options.files))}
        names = sorted(path.name for path in folder.iterdir())
        seconds["hash"] = seconds_of(lambda: hash_files(folder, names))
        known = hash_files(folder, names)
        seconds["seal_with_known_hashes"] = seconds_of(lambda: seal(folder, known))
        seconds["check_sizes"] = seconds_of(lambda: problems(folder, contents=False))
        seconds["check_hashes"] = seconds_of(lambda: problems(folder))
    print(
        json.dumps(
            {
                "gib": options.gib,
                "files": options.files,
                "threads": THREADS,
                "cpus": os.cpu_count(),
                "seconds": {what: round(value, 4) for what, value in seconds.items()},
                "hash_gib_per_second": round(options.gib / seconds["hash"], 2),
                "hash_share_of_write": round(seconds["hash"] / seconds["write_and_fsync"], 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
