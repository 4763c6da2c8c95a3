"""Where records lie in text files: held to json.loads and splitlines on random files cut into random chunks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from prism_nemo.data.spans import item_spans, line_spans
from prism_nemo.errors import DataError

BOM = b"\xef\xbb\xbf"
CHARACTERS = 'ab"\\[]{},: \n\té😀'


def chunks(data: bytes, choose: random.Random, longest: int) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        length = max(choose.randint(1, longest), 4 if start == 0 and data.startswith(BOM) else 1)
        yield data[start : start + length]
        start += length


def value(choose: random.Random, depth: int = 0) -> Any:
    kind = choose.randint(0, 7 if depth < 3 else 4)
    if kind <= 2:
        return "".join(choose.choice(CHARACTERS) for _ in range(choose.randint(0, 8)))
    if kind <= 4:
        return choose.choice([1, -2.5, None, True, 1e300, ""])
    if kind == 5:
        return [value(choose, depth + 1) for _ in range(choose.randint(0, 4))]
    return {str(value(choose, 3)): value(choose, depth + 1) for _ in range(choose.randint(0, 4))}


def all_of(parts: Iterator[np.ndarray]) -> list[list[int]]:
    return np.concatenate([np.empty((0, 3), dtype=np.int64), *parts]).tolist()


@pytest.mark.parametrize("start", range(0, 2000, 500))
def test_items_of_a_list(start: int) -> None:
    for seed in range(start, start + 500):
        choose = random.Random(seed)
        items = [value(choose) for _ in range(choose.randint(0, 6))]
        text = json.dumps(items, ensure_ascii=choose.random() < 0.5, indent=choose.choice([None, 1]))
        data = choose.choice([b"", BOM]) + choose.choice([b"", b" \n"]) + text.encode() + choose.choice([b"", b"\n "])
        spans = all_of(item_spans(chunks(data, choose, choose.choice([1, 3, 20, 1000])), "d.json"))
        assert [json.loads(data[first:end]) for first, end, _ in spans if data[first:end].strip()] == items, seed
        assert [number for *_, number in spans] == list(range(1, len(spans) + 1))
        assert len(spans) == len(items) or (not items and len(spans) == 1 and len(data) > 1)


def test_lines() -> None:
    for seed in range(1000):
        choose = random.Random(seed)
        lines = [choose.choice([b"", b"  ", b"\t\r", b"\0", b"abc", b" x", b"{ }\r"]) for _ in range(choose.randint(0, 9))]
        data = b"\n".join(lines)
        found = [(number, data[first:end]) for first, end, number in all_of(line_spans(chunks(data, choose, 7)))]
        assert found == [(number, line) for number, line in enumerate(lines, start=1) if line.strip()], seed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("{}", "an object, not a list"),
        ("3", "it starts with b'3'"),
        ('[{"a": 1}, {"a": ', "ends within item 2, which starts at byte 10"),
        ('[{"a": "]}', "ends within item 1"),
        ("[1] [2]", "more text behind the list"),
    ],
)
def test_what_is_no_list(text: str, message: str) -> None:
    for longest in (1, 100):
        with pytest.raises(DataError) as caught:
            all_of(item_spans(chunks(text.encode(), random.Random(0), longest), "d.json"))
        assert message in caught.value.what
        assert caught.value.where == "d.json"


def test_a_missing_item_is_an_item() -> None:
    """So that it is named: `[1,,2]` and `[1,]` are not JSON."""
    assert [number for *_, number in all_of(item_spans(iter([b"[1,,2]"]), "w"))] == [1, 2, 3]
    assert len(all_of(item_spans(iter([b"[1,]"]), "w"))) == 2
