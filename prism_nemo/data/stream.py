"""Records -> encoded batches, without end, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from prism_nemo.data.bad_records import BadRecord, BadTally
from prism_nemo.data.order import EpochOrder, MixtureOrder, Order
from prism_nemo.data.record_files import RecordList, RecordSource, UnusableRecord
from prism_nemo.data.record_files import fingerprint as fingerprint  # of lists, for stages that draw from none
from prism_nemo.data.records import Record
from prism_nemo.errors import CheckpointError, ConfigError, DataError

T = TypeVar("T")


class RecordStream(Generic[T]):
    """Endless epochs over `records`, each its own permutation drawn from (seed, epoch); batches run across the ends of epochs.

    The position counts records of the global batch, so it is the same for any number of ranks: rank r of n reads and encodes the
    records r, r + n, … of each global batch. `encode` turns a record into what the stage trains on; a record for which it
    raises DataError, or that cannot be read, is left out of its batch and listed in `bad`.

    records        a list, or files that are read as the records come up
    order          another order than the epochs', that of a mixture
    tally          of all ranks; whoever draws the batches adds every rank's `tried` and `failed` to it
    tried, failed  records of this rank's part of the last batch, and how many of them were left out
    positions      where in the last global batch those stood that were not left out
    """

    def __init__(
        self,
        records: Sequence[Record] | RecordSource,
        encode: Callable[[Record], T],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        max_bad_sample_share: float,
        order: Order | None = None,
    ) -> None:
        if not len(records):
            raise DataError("there are no records to draw from")
        if batch_size < 1:
            raise ConfigError(f"a batch of {batch_size} records", where="trainer.global_batch_size", remedy="at least 1")
        self.records: RecordSource = RecordList(records) if isinstance(records, Sequence) else records
        self.encode = encode
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.tally = BadTally(max_share=max_bad_sample_share, num_records=len(records))
        self.tried = 0
        self.failed = 0
        self.positions: list[int] = []
        self.consumed_samples = 0
        self.bad: list[BadRecord] = []  # this rank's, every bad record once, in the order of their first appearance
        self._listed: set[tuple[str, str]] = set()
        self._order = order or EpochOrder(len(records), [seed], shuffle=shuffle, blocks=self.records.blocks)

    def next_batch(self, rank: int = 0, world_size: int = 1) -> list[tuple[Record, T]]:
        """This rank's part of the next global batch, in order; every rank must call it for the stream to stay in step."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        start = self.consumed_samples
        self.consumed_samples += self.batch_size
        self.tried = self.failed = 0
        self.positions = []
        batch = []
        for position in range(start + rank, start + self.batch_size, world_size):
            index = self._order(position)
            self.tried += 1
            try:
                record = self.records[index]
            except UnusableRecord as error:
                self._add_bad(error.bad)
                continue
            try:
                batch.append((record, self.encode(record)))
                self.positions.append(position - start)
            except DataError as error:
                self._add_bad(BadRecord.from_error(record.id, f"record {record.id}", error))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, what it is a position in, and the tally. Equal on all ranks."""
        drawn = {"drawn": self._order.drawn(self.consumed_samples)} if isinstance(self._order, MixtureOrder) else {}
        return {
            "consumed_samples": self.consumed_samples,
            "num_records": len(self.records),
            "fingerprint": self.records.fingerprint,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "tried": self.tally.tried,
            "failed": self.tally.failed,
            **drawn,  # of every source of a mixture; it follows from the position
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved position, also with another batch size or number of ranks.

        Raises CheckpointError when the records, the seed or `shuffle` differ from the saved stream's: the order would be another.
        """
        own = self.state_dict()
        for name in ("num_records", "fingerprint", "seed", "shuffle"):
            if state[name] != own[name]:
                raise CheckpointError(
                    f"the checkpoint's data stream has {name} {state[name]}, this run has {own[name]}",
                    remedy="resume with the same data and seed, or start a new run from the checkpoint's weights",
                )
        self.consumed_samples = state["consumed_samples"]
        self.tally.tried, self.tally.failed = state["tried"], state["failed"]

    def _add_bad(self, bad: BadRecord) -> None:
        self.failed += 1
        if (bad.id, bad.where) not in self._listed:
            self._listed.add((bad.id, bad.where))
            self.bad.append(bad)
