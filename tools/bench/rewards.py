"""Measures grading: 10,000 responses as a run grades them, 1% of them with pathological expressions; prints JSON.

    python tools/bench/rewards.py [--num-rewards 10000] [--pathological-share 0.01] [--num-workers 2] [--batch-size 512]

Every reward is known beforehand: `wrong` counts those that came out otherwise, pathological ones included, which earn nothing.
`integers_256_ms` is what a step of the bundled digits task grades.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections import Counter

from prism_nemo.config.schema import RewardConfig
from prism_nemo.data.records import Record
from prism_nemo.rewards.grader import Grader

# Several of each: those that the static rules refuse, those that end by themselves, and (six) those that only a limit ends.
PATHOLOGICAL = (
    r"9^{{9^{{9^{{{n}}}}}}}",
    r"\int_0^{{\infty}} e^{{-x^{{{n}x}}}} dx",
    r"({n}!)!",
    r"\frac{{(x+{n})^{{99}}(y+2)^{{99}}}}{{(x+y)^{{99}}}}<(x+2)^{{77}}",
    r"\binom{{999999{n}}}{{499999{n}}}",
    r"\log_{{2}}(3^{{{n}999^{{99}}}})",
    r"9^{{9^9}}+\sqrt{{{n}}}",
    r"\sqrt{{2}}^{{{n}99^{{99}}}}",
    r"\sqrt[99]{{{n}}}^{{99^{{99}}}}",
    r"9^{{9^9}}-{n}\pi",
)


def problems(count: int, pathological_share: float, rng: random.Random) -> list[tuple[str, str, bool]]:
    """(answer, truth, whether it is right), shuffled."""
    found: list[tuple[str, str, bool]] = []
    hostile = round(count * pathological_share)
    for index in range(hostile):
        found.append((PATHOLOGICAL[index % len(PATHOLOGICAL)].format(n=index + 11), r"\sqrt{7}+1", False))
    while len(found) < count:
        n, right = rng.randrange(2, 400), rng.random() < 0.5
        off = 0 if right else 1
        makers = (
            lambda n, off: (f"The answer is {n + off}.", str(n)),
            lambda n, off: (f"{n + off},000", f"{n}000"),
            lambda n, off: (f"{n + off} cm", f"{n}"),
            lambda n, off: (f"**{'ABCD'[(n + off) % 4]}. {n}**", "ABCD"[n % 4]),
            lambda n, off: (f"The {('red', 'green')[off]} one", "red one"),
            lambda n, off: (rf"\sqrt{{{3 * (n + off) ** 2}}}", rf"{n}\sqrt{{3}}"),
            lambda n, off: (rf"$\frac{{{n + off}\pi}}{{2}} + {n}$", rf"{n} + {n}\pi/2"),
            lambda n, off: (f"(x+{n + off})^2", f"x^2+{2 * n}x+{n * n}"),
            lambda n, off: (rf"({n + off}, \sqrt{{8}})", rf"({n}, 2\sqrt{{2}})"),
            lambda n, off: (f"[{n + off}, {n + 9})", rf"{n} \le x < {n + 9}"),
        )
        answer, truth = rng.choice(makers)(n, off)
        found.append((answer, truth, right))
    rng.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-rewards", type=int, default=10_000)
    parser.add_argument("--pathological-share", type=float, default=0.01)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=512, help="rewards of one step")
    options = parser.parse_args()
    cases = problems(options.num_rewards, options.pathological_share, random.Random(0))
    totals: Counter[str] = Counter()
    wrong = 0
    slowest = 0.0
    with Grader(RewardConfig(num_workers=options.num_workers)) as grader:
        responses = [_response(str(n % 9)) for n in range(256)]
        start = time.perf_counter()
        grader.grade(responses, [Record(id="0", prompt="", answer="7")] * 256)
        integers_ms = 1e3 * (time.perf_counter() - start)
        start = time.perf_counter()
        for first in range(0, len(cases), options.batch_size):
            step = time.perf_counter()
            batch = cases[first : first + options.batch_size]
            records = [Record(id=str(first + index), prompt="", answer=truth) for index, (_, truth, _) in enumerate(batch)]
            rewards = grader.grade([_response(answer) for answer, _, _ in batch], records)
            wrong += sum(reward is None or reward.accuracy != right for reward, (_, _, right) in zip(rewards, batch, strict=True))
            slowest = max(slowest, time.perf_counter() - step)
            totals.update({name: int(total) for name, (total, _) in grader.metrics().items()})
        seconds = time.perf_counter() - start
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "rewards": len(cases),
                "pathological": round(options.num_rewards * options.pathological_share),
                "num_workers": options.num_workers,
                "seconds": round(seconds, 1),
                "seconds_slowest_step": round(slowest, 1),
                "wrong": wrong,
                **{name.removeprefix("rewards/"): total for name, total in totals.items()},
                "integers_256_ms": round(integers_ms, 1),
                "worker_cpu_seconds": round(children.ru_utime + children.ru_stime, 1),
                "worker_peak_mb": children.ru_maxrss // 1024,
            }
        )
    )


def _response(answer: str) -> str:
    return f"<caption>c</caption> <think>t</think> <answer>{answer}</answer>"


if __name__ == "__main__":
    main()
