"""When a step's rollouts are begun: as it starts or, with `rollout.max_staleness`, while the step before it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from prism_nemo.config.schema import AlignConfig, RLVRConfig
from prism_nemo.data.stream import RecordStream
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.ahead import packed
from prism_nemo.rollout.sampler import PendingRollouts, Sampler
from prism_nemo.stages.loop import StageLoop


class Begun(Protocol):
    """What a stage begins for a step: rollouts of one batch of prompts, which stood at `positions` of the global batch."""

    @property
    def first(self) -> PendingRollouts: ...

    @property
    def positions(self) -> Sequence[int]: ...


B = TypeVar("B", bound=Begun)
Saved = Sequence[dict[str, Any]]  # rollouts as a checkpoint has them: see `rollout/ahead.py`


@dataclass(frozen=True, eq=False)
class _OneStep(Generic[B]):
    begun: B
    stream_before: dict[str, Any]


class BegunSteps(Generic[B]):
    """Begins every step's rollouts, by the policy's weights of that moment, and keeps those of the step to come.

    A checkpoint has them too: the weights that they come from are gone after it. Every rank calls every method.
    """

    def __init__(
        self,
        config: AlignConfig | RLVRConfig,
        loop: StageLoop,
        policy: PolicyModel,
        sampler: Sampler,
        stream: RecordStream[Any],
        begin: Callable[[int, Saved | None], B],
    ) -> None:
        """`begin` draws the prompts of a step (from 0) and starts to sample; with saved rollouts, only to grade."""
        self._ahead = config.rollout.max_staleness > 0
        self._last = config.trainer.max_steps - 1
        self._loop, self._policy, self._sampler, self._stream = loop, policy, sampler, stream
        self._begin_sampling = begin
        sampler.policy_version = lambda: loop.done
        self._current: _OneStep[B] | None = None
        self._next: _OneStep[B] | None = None
        self._saved: Saved | None = None

    def take(self, step: int) -> B:
        """What was begun for the step, or is begun now."""
        self._current = self._next or self._begin(step)
        self._next = None
        return self._current.begun

    def go_on(self, step: int) -> None:
        """All rollouts of the step are there: those of the next are begun, or the engine sleeps."""
        self._current = None
        self._next = self._begin(step + 1) if self._ahead and step < self._last else None
        self._sampler.sleep()

    def give_back(self) -> None:
        """The step that was taken will not be done: its prompts are the stream's next again."""
        assert self._current is not None
        self._stream.load_state_dict(self._current.stream_before)
        self._current = None

    def update_weights(self) -> None:
        """The engine samples by the policy as it is now, which the number of finished steps names.

        What was begun by the weights of before is waited for.
        """
        if self._next is not None:
            self._next.begun.first.result()
        self._sampler.update_weights(self._policy.hf_tensors(), version=self._loop.done)

    def _begin(self, step: int) -> _OneStep[B]:
        before = self._stream.state_dict()
        self.update_weights()
        saved, self._saved = self._saved, None
        return _OneStep(self._begin_sampling(step, saved), before)

    def state_dict(self) -> dict[str, Any]:
        """The stream as it was before the prompts that were begun, and their rollouts."""
        if self._next is None:
            return {"stream": self._stream.state_dict()}
        begun = self._next.begun
        return {"stream": self._next.stream_before, "begun": packed(begun.first, begun.positions, self._policy.runtime)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self._saved = state.get("begun")
