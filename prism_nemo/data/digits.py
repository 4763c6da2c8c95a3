"""The bundled task: reading strips of real handwritten digits and reasoning about them, with no download.

The digits are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set: 1,797 images of 8 x 8 pixels.
They are split by image into train and test; a strip is 3 or 4 of them at 32 x 32 pixels side by side. `digits_text` says what is
asked and answered, `digits_model` what model starts on it.

`write_digits_task` writes files that `data.readers` reads:

    public.jsonl    noisy demonstrations, for SFT: captions misread, results off, one style
    teacher.jsonl   clean demonstrations with answer, caption and the content probe's other side, for warm-up and alignment
    prompts.jsonl   prompts with answer and caption and no response, for RLVR
    test.jsonl      as teacher.jsonl, with digits that no other file shows
    images/         the strips, as PNG: one a record in test.jsonl, elsewhere one for every question in turn
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prism_nemo.data.digits_model import build_tokenizer, write_base_model, write_model_files
from prism_nemo.data.digits_text import (
    DEMO_QUESTIONS,
    MAX_DIGITS,
    QUESTIONS,
    SYSTEM_PROMPT,
    probe,
    respond,
    respond_noisily,
    result,
)
from prism_nemo.data.files import new_directory
from prism_nemo.data.records import IMAGE_PLACEHOLDER
from prism_nemo.errors import ConfigError

__all__ = ["SYSTEM_PROMPT", "DigitsTask", "build_tokenizer", "write_base_model", "write_digits_task", "write_model_files"]

TILE = 32  # pixels: one merged visual token
MIN_DIGITS = 3
TEST_SHARE = 0.2  # of the handwritten digits
_FULL_SCALE = 16  # the set's white
_SPLITS = ("public", "teacher", "prompts", "test")


@dataclass(frozen=True)
class DigitsTask:
    """Where the task's files are. Image paths in them are relative to `root`."""

    root: Path

    @property
    def public(self) -> Path:
        return self.root / "public.jsonl"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher.jsonl"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def test(self) -> Path:
        return self.root / "test.jsonl"


def write_digits_task(
    out: Path,
    *,
    seed: int,
    num_public: int,
    num_teacher: int,
    num_prompts: int,
    num_test: int,
    questions: Sequence[str] = DEMO_QUESTIONS,
) -> DigitsTask:
    """Draw the task's records from `seed` and write them to the new directory `out`.

    `questions` are keys of `digits_text.QUESTIONS`, each record asking one of them. The same seed and sizes give the same bytes.
    Raises DataError when `out` exists and is not empty, ConfigError for an unknown question or a file without records.
    """
    unknown = set(questions) - set(QUESTIONS)
    if unknown or not questions:
        raise ConfigError(f"unknown questions: {sorted(unknown)}", where="questions", remedy=f"some of {', '.join(QUESTIONS)}")
    sizes = dict(zip(_SPLITS, (num_public, num_teacher, num_prompts, num_test), strict=True))
    if min(sizes.values()) < 1:
        raise ConfigError(
            f"a file without records: {sizes}", where="num_public, num_teacher, num_prompts, num_test", remedy="at least 1 each"
        )
    tiles, labels = _load_tiles()
    train, test = _split(len(labels), seed)
    with new_directory(out) as directory:
        (directory / "images").mkdir()
        for number, (split, size) in enumerate(sizes.items()):
            strips = _Strips(tiles, labels, test if split == "test" else train, directory)
            records = _records(split, size, strips, questions, np.random.default_rng([seed, 1 + number]))
            with (directory / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    return DigitsTask(Path(out))


def _load_tiles() -> tuple[np.ndarray, np.ndarray]:
    """Every handwritten digit as uint8 [1797, TILE, TILE], white ink on black, and what it is, int [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.round(digits.images * (255 / _FULL_SCALE)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.BICUBIC)) for image in small]
    return np.stack(large), digits.target


def _split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the train and the test digits."""
    order = np.random.default_rng([seed, 0]).permutation(count)
    num_test = round(count * TEST_SHARE)
    return order[num_test:], order[:num_test]


@dataclass(frozen=True)
class _Strips:
    """Draws strips of digits out of a pool, and writes them below `directory`."""

    tiles: np.ndarray
    labels: np.ndarray
    pool: np.ndarray
    directory: Path

    def draw(self, image: str, rng: np.random.Generator) -> list[int]:
        """Write a strip as the file `image` and return the indices of its digits."""
        chosen = rng.choice(self.pool, size=int(rng.integers(MIN_DIGITS, MAX_DIGITS + 1)), replace=False)
        Image.fromarray(np.concatenate(self.tiles[chosen], axis=1)).save(self.directory / image, compress_level=1)
        return [int(index) for index in chosen]


def _records(
    split: str, size: int, strips: _Strips, questions: Sequence[str], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Write the strips of one file and yield its records."""
    asked = 1 if split == "test" else len(questions)  # questions a strip; held-out problems are independent of each other
    for number in range(size):
        if number % asked == 0:
            image = f"images/{split}-{number // asked:05d}.png"
            sources = strips.draw(image, rng)
            digits = [int(strips.labels[source]) for source in sources]
            order = rng.permutation(len(questions))
        question = questions[order[number % asked]]
        yield {
            "id": f"{split}-{number:05d}",
            "messages": [
                {"role": "user", "content": f"{IMAGE_PLACEHOLDER} {QUESTIONS[question]}"},
                *_demonstration(split, question, digits, rng),
            ],
            "images": [image],
            **_facts(split, question, digits, rng),
            "metadata": {"question": question, "digits": digits, "sources": sources},
        }


def _demonstration(split: str, question: str, digits: list[int], rng: np.random.Generator) -> list[dict[str, str]]:
    if split == "prompts":
        return []
    response = respond_noisily(question, digits, rng) if split == "public" else respond(question, digits)
    return [{"role": "assistant", "content": response.text}]


def _facts(split: str, question: str, digits: list[int], rng: np.random.Generator) -> dict[str, str]:
    """What is known for sure; the public demonstrations know nothing."""
    if split == "public":
        return {}
    facts = {"answer": str(result(question, digits)), "caption": " ".join(map(str, digits))}
    return facts if split == "prompts" else facts | {"probe_response": probe(question, digits, rng).text}
