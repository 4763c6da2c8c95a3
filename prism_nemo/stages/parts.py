"""Results of a run without steps, kept record by record as they come, so that it can be stopped and go on.

    <run>/parts/run.json            what the results were made of
    <run>/parts/rank_00000.jsonl    one line a record that this data-parallel rank has done: {"record": its number, …}

Any number of ranks goes on with what any other number has left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import PrismError
from prism_nemo.run_directory import cut_torn_line, write_atomically


class PartFiles:
    """The folder of parts. `made_of`: what must be the same when a run goes on, and is not in its configuration.

    Every rank makes one and calls every method. Raises PrismError when an interrupted run's parts were made of something else.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, str], runtime: Runtime) -> None:
        self.folder = folder
        self.runtime = runtime
        # Of the ranks that hold one model, and so the same results, those write that are in the main rank's data-parallel group.
        self._writes = runtime.gather_objects(runtime.rank)[0] == 0
        if runtime.is_main:
            self._open(dict(made_of))
        runtime.barrier()

    def _open(self, made_of: dict[str, str]) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / "run.json"
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else made_of
        for name, value in made_of.items():
            if earlier.get(name) != value:
                raise PrismError(
                    f"the interrupted run was made of another {name}: {earlier.get(name)}, now {value}",
                    where=str(self.folder),
                    remedy="give it as it was, or start anew with experiment.overwrite=true",
                )
        write_atomically(file, json.dumps(made_of, indent=2) + "\n")
        for path in self._files():
            cut_torn_line(path)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes this data-parallel rank's next results, each with its `record`."""
        if self._writes and rows:
            with (self.folder / f"rank_{self.runtime.data_parallel_rank:05d}.jsonl").open("a", encoding="ascii") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def in_order(self) -> Iterator[dict[str, Any]]:
        """All results by their records' numbers, one at a time. The ranks must have met behind their last `append`."""
        places = []
        for path in self._files():
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    places.append((json.loads(line)["record"], path, offset))
                    offset += len(line)
        for _, path, offset in sorted(places):
            with path.open("rb") as file:
                file.seek(offset)
                yield json.loads(file.readline())

    def remove(self) -> None:
        """Behind this, a run starts anew."""
        self.runtime.barrier()
        if self.runtime.is_main:
            shutil.rmtree(self.folder)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rank_*.jsonl"))
