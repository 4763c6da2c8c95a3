"""How ranks talk before anything that they are to check works: lines of JSON over TCP, all through the first rank.

It notices a rank that ends when its connection closes, one that is stopped when it no longer beats, and one that hangs when a
round's time is up. No torch, no threads that a process would wait for at its end.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from prism_nemo.doctor.place import Place

PORTS = 15  # that are tried, above MASTER_PORT, which torchrun itself listens on
_MAX_LINE_BYTES = 1 << 22
_RETRY_SECONDS = 0.2
_CONNECT_SECONDS = 2.0
_GRACE_SECONDS = 3.0  # beyond a round's limit, for the answer to come
_BACKLOG = 4096
_BEAT_SECONDS = 1.0
_SILENT_SECONDS = 15.0  # without a beat, a rank is given up; one that never came is waited for as long as a round lasts


class MeetingLost(Exception):
    """The first rank cannot be reached, or no longer. The message says which."""


@dataclass(frozen=True)
class Round:
    """What every rank said in a round, in rank order; None of those that did not."""

    values: list[Any]
    ended: frozenset[int]  # ranks whose connection has closed
    silent: frozenset[int]  # ranks that did not answer in time

    @property
    def missing(self) -> frozenset[int]:
        return self.ended | self.silent


class Meeting(Protocol):
    def exchange(self, value: Any) -> Round:
        """`value` of every rank on every rank."""

    def gather(self, value: Any) -> Round:
        """`value` of every rank on the first; the others learn only who is missing."""

    def clock_offset(self) -> float:
        """Seconds that the first rank's clock is ahead of this one's, within half of the time an answer takes."""

    def missing(self) -> list[int]: ...

    def leave(self) -> None: ...


class Alone:
    """A meeting of one."""

    def exchange(self, value: Any) -> Round:
        return Round([value], frozenset(), frozenset())

    gather = exchange

    def clock_offset(self) -> float:
        return 0.0

    def missing(self) -> list[int]:
        return []

    def leave(self) -> None:
        pass


@dataclass
class _RoundState:
    began: float = field(default_factory=time.monotonic)
    values: dict[int, Any] = field(default_factory=dict)
    result: Round | None = None


class Host:
    """The first rank's part: hears everybody, and answers a round when all have spoken, have gone, or the time is up."""

    def __init__(self, place: Place, limit: float) -> None:
        self._place = place
        self._limit = limit
        self._changed = threading.Condition()
        self._rounds: dict[int, _RoundState] = {}
        self._ended: set[int] = set()
        self._given_up: set[int] = set()
        self._heard: dict[int, float] = {}
        self._waiting: set[int] = set()
        self._listener = self._listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _listen(self) -> socket.socket:
        address = self._place.master_address
        # Who is only on this machine is not asked from elsewhere.
        bound = "127.0.0.1" if address in ("localhost", "127.0.0.1") else ""
        for port in _ports(self._place):
            with contextlib.suppress(OSError):
                return listen(bound, port)
        raise MeetingLost(f"none of the {PORTS} ports above MASTER_PORT={self._place.master_port} is free")

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        rank = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), connection:
            lines = _lines(connection)
            hello = next(lines, None)
            if hello is None or hello["job"] != self._place.job or not 0 <= int(hello["rank"]) < self._place.world_size:
                return
            rank = int(hello["rank"])
            _send(connection, {"welcome": self._place.job})
            for line in lines:
                self._heard[rank] = time.monotonic()
                if "beat" in line:
                    continue
                if "clock" in line:
                    _send(connection, {"time": time.time()})
                    continue
                if "missing" in line:
                    _send(connection, {"missing": self._missing()})
                    continue
                self._waiting.add(rank)  # its signs of life are not read meanwhile
                found = self._speak(rank, line["round"], line["value"])
                self._heard[rank] = time.monotonic()
                self._waiting.discard(rank)
                values = found.values if line["to_all"] or rank == 0 else []
                _send(connection, {"values": values, "ended": sorted(found.ended), "silent": sorted(found.silent)})
        if rank is not None:
            with self._changed:
                self._ended.add(rank)
                self._changed.notify_all()

    def close(self) -> None:
        """Lets the others take their last answer and go; the first rank has gone before."""
        with self._changed:
            everybody = set(range(self._place.world_size))
            self._changed.wait_for(lambda: everybody <= self._ended | self._given_up, timeout=_GRACE_SECONDS)
        self._listener.close()

    def _speak(self, rank: int, number: int, value: Any) -> Round:
        with self._changed:
            state = self._rounds.setdefault(number, _RoundState())
            if state.result is None:
                state.values[rank] = value
                self._changed.notify_all()
            while state.result is None:
                absent = set(range(self._place.world_size)) - state.values.keys()
                self._given_up |= {one for one in absent if self._is_silent(one)}
                left = state.began + self._limit - time.monotonic()
                if left <= 0:
                    self._given_up |= absent - self._ended
                if absent <= self._ended | self._given_up:
                    values = [state.values.get(one) for one in range(self._place.world_size)]
                    ended = absent & self._ended
                    state.result = Round(values, frozenset(ended), frozenset(absent - ended))
                    self._changed.notify_all()
                else:
                    self._changed.wait(min(left, _BEAT_SECONDS))
            return state.result

    def _missing(self) -> list[int]:
        with self._changed:
            return sorted(self._ended | self._given_up | {rank for rank in list(self._heard) if self._is_silent(rank)})

    def _is_silent(self, rank: int) -> bool:
        if rank not in self._heard or rank in self._waiting:
            return False
        return time.monotonic() - self._heard[rank] > min(_SILENT_SECONDS, self._limit)


class Guest:
    """Any rank's part, the first one's included. limit: seconds that a round, and arriving, may take."""

    def __init__(self, place: Place, limit: float) -> None:
        self._place = place
        self._limit = limit
        self._round = 0
        self._connection, self._lines = self._connect()
        self._sending = threading.Lock()
        threading.Thread(target=self._beat, daemon=True).start()

    @property
    def address(self) -> str:
        """This node's, as the first rank's node is reached from it."""
        return str(self._connection.getsockname()[0])

    def exchange(self, value: Any) -> Round:
        return self._speak(value, to_all=True)

    def gather(self, value: Any) -> Round:
        return self._speak(value, to_all=False)

    def _speak(self, value: Any, *, to_all: bool) -> Round:
        self._round += 1
        answer = self._ask({"round": self._round, "value": value, "to_all": to_all}, self._limit + _GRACE_SECONDS)
        return Round(answer["values"], frozenset(answer["ended"]), frozenset(answer["silent"]))

    def clock_offset(self) -> float:
        offsets = []
        for _ in range(3):
            before = time.time()
            theirs = self._ask({"clock": True}, self._limit)["time"]
            after = time.time()
            offsets.append((after - before, theirs - (before + after) / 2))
        return min(offsets)[1]

    def missing(self) -> list[int]:
        """Ranks that are known to have ended or stopped, at once."""
        return list(self._ask({"missing": True}, self._limit)["missing"])

    def leave(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _beat(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                time.sleep(_BEAT_SECONDS)
                with self._sending:
                    _send(self._connection, {"beat": True})

    def _ask(self, message: dict[str, Any], limit: float) -> dict[str, Any]:
        first = f"rank 0 on {self._place.master_address}"
        try:
            with self._sending:
                self._connection.settimeout(limit)
                _send(self._connection, message)
            answer = next(self._lines, None)
        except TimeoutError:
            raise MeetingLost(f"{first} has not answered for {limit:g} s") from None
        except (OSError, ValueError) as error:
            raise MeetingLost(f"{first} is gone: {error}") from error
        if answer is None:
            raise MeetingLost(f"{first} has ended")
        return answer

    def _connect(self) -> tuple[socket.socket, Iterator[dict[str, Any]]]:
        deadline = time.monotonic() + self._limit
        problem = "nobody listens"
        while time.monotonic() < deadline:
            for port in _ports(self._place):
                try:
                    connection = socket.create_connection((self._place.master_address, port), timeout=_CONNECT_SECONDS)
                except ConnectionRefusedError:
                    continue
                except OSError as error:
                    problem = str(error)
                    break
                with contextlib.suppress(OSError, ValueError):
                    lines = _lines(connection)
                    _send(connection, {"job": self._place.job, "rank": self._place.rank})
                    if next(lines, {}).get("welcome") == self._place.job:
                        return connection, lines
                connection.close()
            time.sleep(_RETRY_SECONDS)
        first = f"rank 0 on {self._place.master_address}"
        raise MeetingLost(f"{first} was not found within {self._limit:g} s, on ports above {self._place.master_port}: {problem}")


def listen(address: str, port: int) -> socket.socket:
    """Listens at an IPv4 address, or at all of this machine's (""), IPv6 too where there is any; port 0: any."""
    if not address and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    return socket.create_server((address, port), backlog=_BACKLOG)


def _ports(place: Place) -> range:
    return range(place.master_port + 1, place.master_port + 1 + PORTS)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """Objects as they come, until the other end closes. Raises ValueError for what is none, and what the socket raises."""
    received = b""
    while True:
        while b"\n" in received:
            line, _, received = received.partition(b"\n")
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
            yield value
        if len(received) > _MAX_LINE_BYTES:
            raise ValueError("a line without an end")
        chunk = connection.recv(1 << 16)
        if not chunk:
            return
        received += chunk
