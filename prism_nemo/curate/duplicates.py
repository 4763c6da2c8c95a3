"""Finds records that are the same as others, or as benchmark records: exactly, or nearly.

Candidates come from hash tables, so the cost grows with the number of records and not with its square; what is a candidate is
then compared in full. Prompts: MinHash of 64 values in 16 bands, which misses a pair of prompts of similarity 0.8 once in 5,000,
and with prompts that are the same never. Pictures: eight bands of 32 bits, one of which two hashes that differ in at most 7 bits
must have in common: nothing is missed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from prism_nemo.config.endpoint import CurationConfig
from prism_nemo.curate.fingerprints import Fingerprint, numbers, shingles, similarity, words

_BANDS, _ROWS = 16, 4


class _Table:
    """Numbers by the hash of a key. Keys that collide only make candidates more."""

    def __init__(self) -> None:
        self._numbers: dict[int, int | list[int]] = {}  # mostly one, for which a list would be a waste

    def add(self, key: object, number: int) -> None:
        found = self._numbers.setdefault(hash(key), number)
        if isinstance(found, list):
            found.append(number)
        elif found is not number:
            self._numbers[hash(key)] = [found, number]

    def get(self, key: object) -> Sequence[int]:
        found = self._numbers.get(hash(key), ())
        return (found,) if isinstance(found, int) else found


class Prompts:
    """Distinct prompts, numbered as they come, and which of them are nearly the same."""

    def __init__(self, min_similarity: float) -> None:
        self.min_similarity = min_similarity
        self._numbers: dict[str, int] = {}
        self._texts: list[str] = []
        self._table = _Table()

    def near(self, prompt: str) -> list[int]:
        """The known prompts that are the same or nearly so, and have the same numbers."""
        own = shingles(prompt)
        candidates = {number for band in _bands(prompt) for number in self._table.get(band)}
        return sorted(number for number in candidates if similarity(own, shingles(self._texts[number])) >= self.min_similarity)

    def add(self, prompt: str) -> int:
        """The prompt's number, a new one where it was not known."""
        if prompt not in self._numbers:
            number = self._numbers[prompt] = len(self._texts)
            self._texts.append(prompt)
            for band in _bands(prompt):
                self._table.add(band, number)
        return self._numbers[prompt]


class Duplicates:
    """Records with the same pictures in the same order and nearly the same prompt as an earlier one."""

    def __init__(self, config: CurationConfig) -> None:
        self._max_distance = config.max_image_distance
        self._prompts = Prompts(config.min_similarity)
        self._pictures: list[tuple[tuple[str, str], ...]] = []
        self._ids: list[str] = []
        self._table = _Table()  # records by prompt and first picture

    def first_like(self, record_id: str, fingerprint: Fingerprint) -> str | None:
        """The id of the first known record that is the same; None, and the record is known from now on, when there is none."""
        pictures = fingerprint.pictures
        keys = _keys(pictures[0]) if pictures else [""]
        candidates = {
            index for prompt in self._prompts.near(fingerprint.prompt) for key in keys for index in self._table.get((prompt, key))
        }
        for index in sorted(candidates):
            others = self._pictures[index]
            if len(others) == len(pictures) and all(map(self._same, others, pictures)):
                return self._ids[index]
        prompt = self._prompts.add(fingerprint.prompt)
        for key in keys:
            self._table.add((prompt, key), len(self._ids))
        self._ids.append(record_id)
        self._pictures.append(pictures)
        return None

    def _same(self, first: tuple[str, str], second: tuple[str, str]) -> bool:
        return same_picture(first, second, self._max_distance)


class Benchmarks:
    """What must not be trained on: the pictures and the prompts of benchmark records."""

    def __init__(self, config: CurationConfig) -> None:
        self._max_distance = config.max_image_distance
        self._min_words = config.exclude_min_words
        self._prompts = Prompts(config.min_similarity)
        self._without_pictures: set[int] = set()
        self._pictures: list[tuple[tuple[str, str], str]] = []
        self._table = _Table()
        self._ids: dict[int, str] = {}  # of the first record with a prompt

    def add(self, record_id: str, fingerprint: Fingerprint) -> None:
        prompt = self._prompts.add(fingerprint.prompt)
        self._ids.setdefault(prompt, record_id)
        if not fingerprint.pictures:
            self._without_pictures.add(prompt)
        for picture in fingerprint.pictures:
            for key in _keys(picture):
                self._table.add(key, len(self._pictures))
            self._pictures.append((picture, record_id))

    def overlap(self, fingerprint: Fingerprint) -> tuple[str, str] | None:
        """What a record has of a benchmark, "benchmark image" or "benchmark prompt", and of which benchmark record.

        A picture of a benchmark is enough, whatever is asked about it. A prompt is enough when it is so long that it is that
        problem's own (`exclude_min_words`), or when neither record has pictures.
        """
        for picture in fingerprint.pictures:
            for index in sorted({index for key in _keys(picture) for index in self._table.get(key)}):
                other, record_id = self._pictures[index]
                if same_picture(picture, other, self._max_distance):
                    return "benchmark image", record_id
        is_long = len(words(fingerprint.prompt)) >= self._min_words
        for prompt in self._prompts.near(fingerprint.prompt):
            if is_long or (not fingerprint.pictures and prompt in self._without_pictures):
                return "benchmark prompt", self._ids[prompt]
        return None


def same_picture(first: tuple[str, str], second: tuple[str, str], max_distance: int) -> bool:
    if first[0] == second[0]:
        return True
    if not first[1] or not second[1]:
        return False
    return (int(first[1], 16) ^ int(second[1], 16)).bit_count() <= max_distance


def _keys(picture: tuple[str, str]) -> list[object]:
    """Two pictures that are the same have one of these in common."""
    pixels, gradients = picture
    return [pixels, *((band, gradients[8 * band : 8 * band + 8]) for band in range(8) if gradients)]


def _bands(prompt: str) -> Iterator[tuple[int, bytes]]:
    """The MinHash of a prompt's shingles, cut into bands; with its numbers, so that only prompts with the same ones can meet."""
    digests = b"".join(hashlib.blake2b(repr(shingle).encode(), digest_size=8).digest() for shingle in shingles(prompt))
    factors, offsets = _permutations()
    values = factors[:, None] * np.frombuffer(digests, dtype="<u8")[None, :] + offsets[:, None]  # modulo 2^64
    least = values.min(axis=1).reshape(_BANDS, _ROWS)
    salt = repr(numbers(prompt)).encode()
    return ((number, salt + band.tobytes()) for number, band in enumerate(least))


@cache
def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Orders of 64-bit numbers: by a x + b modulo 2^64, a odd."""
    generator = np.random.default_rng(0)
    factors, offsets = generator.integers(0, 1 << 64, (2, _BANDS * _ROWS), dtype=np.uint64)
    return factors | np.uint64(1), offsets
