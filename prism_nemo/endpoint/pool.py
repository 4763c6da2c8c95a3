"""Many requests at a time, their answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

from prism_nemo.endpoint.errors import Stopped

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class RequestPool(Generic[K, T]):
    """Runs blocking calls in threads. To leave the block, however, drops what has not begun and waits for what has.

    with RequestPool[int, Reply](8) as pool:
        pool.submit(0, lambda: endpoint.ask(messages))
        for number, reply in pool.wait(timeout=1.0): ...
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._executor = ThreadPoolExecutor(size, thread_name_prefix="endpoint")
        self._calls: dict[Future[T], K] = {}

    def __enter__(self) -> RequestPool[K, T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    @property
    def free(self) -> int:
        """Calls that can be submitted so that the threads have something to do, and no more is held than that takes."""
        return max(0, 2 * self.size - len(self._calls))

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    def submit(self, key: K, call: Callable[[], T]) -> None:
        self._calls[self._executor.submit(call)] = key

    def wait(self, timeout: float) -> list[tuple[K, T]]:
        """The calls that have ended, once one has or the seconds are over; in the order in which they were submitted.

        Raises what a call raised, but for Stopped: such a call has ended without a result.
        """
        if not self._calls:
            return []
        done, _ = wait(self._calls, timeout=timeout, return_when=FIRST_COMPLETED)
        ended: list[tuple[K, T]] = []
        for future in [future for future in self._calls if future in done]:
            key = self._calls.pop(future)
            try:
                ended.append((key, future.result()))
            except Stopped:
                continue
        return ended
