"""Which record comes at which position of an endless stream: a pure function of the position and the seed.

So a stream is resumed by its position alone, and any number of ranks agrees on it without a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from prism_nemo.data.items import Block
from prism_nemo.data.parquet_items import CACHED_BYTES
from prism_nemo.errors import ConfigError

CYCLE = 10_000  # positions after which a mixture repeats its order of sources: weights are exact to one in so many


class Order(Protocol):
    def __call__(self, position: int) -> int:
        """The record's index at a position from 0."""
        ...


class EpochOrder:
    """Endless epochs over `num_records`, each a permutation of its own.

    Where records come in `blocks` that are read as a whole, an epoch is a permutation of the blocks, taken window by window: as
    many as fit into `window_bytes` (by default all that is kept of row groups) are shuffled through. 8 bytes a record are held.
    """

    def __init__(
        self,
        num_records: int,
        seed: Sequence[int],
        *,
        shuffle: bool,
        blocks: Sequence[Block] | None = None,
        window_bytes: int | None = None,
    ) -> None:
        self._num_records = num_records
        self._seed = list(seed)
        self._shuffle = shuffle
        self._blocks = blocks
        self._window_bytes = CACHED_BYTES if window_bytes is None else window_bytes
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_records)
        if not self._shuffle:
            return offset
        if epoch != self._epoch:
            generator = np.random.default_rng([*self._seed, epoch])
            if self._blocks is None:
                self._order = generator.permutation(self._num_records)
            else:
                self._order = _block_permutation(self._blocks, generator, self._window_bytes)
            self._epoch = epoch
        return int(self._order[offset])


class MixtureOrder:
    """Sources drawn in proportion to their weights, each in epochs of its own.

    After any number of positions, each source has been drawn its share of times to within two. The records of source k start at
    `sum(sizes[:k])`. Raises ConfigError for a weight too small to come up in `CYCLE` positions.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], orders: Sequence[Order], sizes: Sequence[int]) -> None:
        self._names = list(names)
        self._orders = orders
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        shares = _shares(weights)
        for name, share in zip(names, shares, strict=True):
            if share == 0:
                raise ConfigError(
                    f"the weight of `{name}` is less than one in {CYCLE} of all",
                    where=f"data.mixture.{name}.weight",
                    remedy="raise it, or leave the source out",
                )
        self._cycle = _interleaved(shares)
        self._drawn = np.stack([np.concatenate([[0], np.cumsum(self._cycle == source)]) for source in range(len(shares))])

    def __call__(self, position: int) -> int:
        cycle, offset = divmod(position, CYCLE)
        source = int(self._cycle[offset])
        own = cycle * int(self._drawn[source, -1]) + int(self._drawn[source, offset])
        return int(self._starts[source]) + self._orders[source](own)

    def drawn(self, position: int) -> dict[str, int]:
        """How many records of each source lie before a position."""
        cycle, offset = divmod(position, CYCLE)
        return {
            name: cycle * int(self._drawn[source, -1]) + int(self._drawn[source, offset])
            for source, name in enumerate(self._names)
        }


def _shares(weights: Sequence[float]) -> list[int]:
    """How many of `CYCLE` positions each source gets: rounded down, the rest to those that lost most."""
    total = math.fsum(weights)
    exact = [weight / total * CYCLE for weight in weights]
    shares = [math.floor(value) for value in exact]
    lost = sorted(range(len(weights)), key=lambda index: (shares[index] - exact[index], index))
    for index in lost[: CYCLE - sum(shares)]:
        shares[index] += 1
    return shares


def _interleaved(shares: Sequence[int]) -> np.ndarray:
    """Source of every position of a cycle, int64 [CYCLE]: at each the one that lags furthest behind its share."""
    lag = np.zeros(len(shares), dtype=np.int64)
    cycle = np.empty(CYCLE, dtype=np.int64)
    for position in range(CYCLE):
        lag += shares
        source = int(lag.argmax())
        cycle[position] = source
        lag[source] -= CYCLE
    return cycle


def _block_permutation(blocks: Sequence[Block], generator: np.random.Generator, window_bytes: int) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum([block.items for block in blocks])])
    chosen = generator.permutation(len(blocks))
    ends, held = [0], 0
    for place, number in enumerate(chosen):
        if held and held + blocks[number].num_bytes > window_bytes:
            ends.append(place)
            held = 0
        held += blocks[number].num_bytes
    windows = []
    for first, last in pairwise([*ends, len(chosen)]):
        window = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in chosen[first:last]])
        windows.append(generator.permutation(window))
    return np.concatenate(windows)
