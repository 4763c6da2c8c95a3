"""What curation costs beside policy and teacher: comparing records, and asking a server that answers at once. Prints JSON.

    OMP_NUM_THREADS=1 python tools/bench/curate.py [--records 100000] [--requests 400] [--concurrency 8]

Records: prompts of 12 to 40 random words and a random picture hash each, one in twenty a changed copy of an earlier one (a word,
and some bits of the hash), against 10,000 benchmark records. Pictures are hashed apart: photographs of 640 x 427 as JPEG files.
Requests: distinct ones to a server of this machine, in this process, and then again from the cache; with a 100 kB image each.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from helpers.chat_server import chat_server, completion, endpoint_config

from prism_nemo.config.endpoint import CurationConfig
from prism_nemo.curate.duplicates import Benchmarks, Duplicates
from prism_nemo.curate.fingerprints import Fingerprint
from prism_nemo.data.records import ImageSource, Record
from prism_nemo.endpoint.client import Endpoint


def changed_copy(of: Fingerprint, words: list[str], generator: random.Random) -> Fingerprint:
    prompt = of.prompt.split()
    prompt[generator.randrange(len(prompt))] = generator.choice(words)
    bits = int(of.pictures[0][1], 16)
    for place in generator.sample(range(256), generator.randrange(8)):
        bits ^= 1 << place
    return Fingerprint(" ".join(prompt), ((f"{generator.getrandbits(64):x}", f"{bits:064x}"),))


def fingerprints(count: int, seed: int) -> list[Fingerprint]:
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9))) for _ in range(5000)]
    made: list[Fingerprint] = []
    for number in range(count):
        if number % 20 == 19:
            made.append(changed_copy(made[generator.randrange(number)], words, generator))
            continue
        prompt = " ".join(generator.choices(words, k=generator.randint(12, 40)))
        made.append(Fingerprint(prompt, ((f"{generator.getrandbits(64):x}", f"{generator.getrandbits(256):064x}"),)))
    return made


def compare(count: int) -> dict[str, float]:
    config = CurationConfig()
    benchmarks, earlier = Benchmarks(config), Duplicates(config)
    for number, one in enumerate(fingerprints(10_000, seed=1)):
        benchmarks.add(str(number), one)
    records = fingerprints(count, seed=0)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = sum(benchmarks.overlap(one) is None and earlier.first_like(str(n), one) is not None for n, one in enumerate(records))
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"records": count, "seconds": round(seconds, 1), "duplicates": found, "tables_mb": round(grown / 1024)}


def hash_pictures(count: int) -> dict[str, float]:
    buffers = []
    for array in load_sample_images().images:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=90)
        buffers.append(buffer.getvalue())
    began = time.perf_counter()
    for number in range(count):
        Fingerprint.of(Record(id=str(number), prompt="<image>", images=(ImageSource(data=buffers[number % len(buffers)]),)))
    return {"pictures": count, "milliseconds_each": round((time.perf_counter() - began) / count * 1000, 2)}


def ask(count: int, concurrency: int) -> dict[str, float]:
    image = "data:image/png;base64," + "A" * 100_000

    def messages(number: int) -> list[dict[str, Any]]:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": str(number)}]
        return [{"role": "user", "content": content}]

    seconds = []
    with tempfile.TemporaryDirectory() as folder, chat_server(lambda seen, number: completion("yes " * 500)) as server:
        for _ in range(2):
            endpoint = Endpoint(endpoint_config(server, max_concurrency=concurrency), Path(folder), section="teacher")
            began = time.perf_counter()
            with ThreadPoolExecutor(concurrency) as threads:
                list(threads.map(lambda number: endpoint.ask(messages(number)), range(count)))  # noqa: B023
            seconds.append(time.perf_counter() - began)
    per_second = [round(count / each) for each in seconds]
    return {"requests": count, "concurrency": concurrency, "asked_per_second": per_second[0], "cached_per_second": per_second[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=8)
    options = parser.parse_args()
    result = {
        "compare": compare(options.records),
        "hash": hash_pictures(200),
        "ask": ask(options.requests, options.concurrency),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
