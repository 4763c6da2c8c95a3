"""From prompts to rollouts that are sampled, read as text and graded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.rollout import RolloutConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.grader import Grader
from prism_nemo.rewards.registry import Reward
from prism_nemo.rollout.base import (
    Generated,
    PendingGeneration,
    Rollout,
    RolloutEngine,
    RolloutError,
    rollout_seed,
    shared_rollouts,
)
from prism_nemo.rollout.batch import RolloutBatch, sampling_params

Prompts = Sequence[tuple[Record, EncodedPrompt]]


@dataclass(eq=False)
class Sampler:
    """A policy's engine with all that is needed to sample from it. Without a grader nothing is graded.

    weights_version   of the weights that the engine has; -1 where it was given none
    policy_version    of the policy's weights as they are now; None: they do not change
    """

    engine: RolloutEngine
    encoder: ChatEncoder
    grader: Grader | None
    runtime: Runtime
    seed: int
    weights_version: int = -1
    policy_version: Callable[[], int] | None = None
    _background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grading"), init=False, repr=False)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Gives the engine the policy's weights, unless it has them (see `RolloutEngine.update_weights`). A collective."""
        if version != self.weights_version:
            self.engine.update_weights(tensors, version)
            self.weights_version = version

    def restore_weights(self) -> None:
        """The engine has lost its weights, and gets the policy's: those of now, which may be newer. A collective."""
        if self.policy_version is not None:
            self.weights_version = self.policy_version()
        self.engine.restore_weights(self.weights_version)

    def sleep(self) -> None:
        """Nothing is sampled for a while: gives memory back. `begin` wakes the engine up."""
        if not self.engine.sleep():
            self.weights_version = -1

    def metrics(self) -> MetricSums:
        """What the engine has to say about the time since it was asked last."""
        return {f"servers/{name}": value for name, value in self.engine.metrics().items()}

    def close(self) -> None:
        """Ends what the engine started."""
        self.engine.close()

    def sample(self, batch: Prompts, config: RolloutConfig, *, step: int) -> RolloutBatch:
        """`num_rollouts_per_prompt` graded responses to each prompt. A collective."""
        return self.begin(batch, config, step=step).result()

    def begin(
        self, batch: Prompts, config: RolloutConfig, *, step: int, attempt: int = 0, given: Sequence[Rollout] | None = None
    ) -> PendingRollouts:
        """Starts to sample and to grade; what can be done in the background goes on there.

        Seeds depend on the run's seed, the step, the record and the response's number, and on `attempt`: a prompt that comes up
        again within a step gets other responses. A collective of the ranks that hold one model.

        given: rollouts of the batch that there are already, from before the run was stopped; they are only graded.
        """
        count = config.num_rollouts_per_prompt
        records, prompts = [record for record, _ in batch], [prompt for _, prompt in batch]
        if given is not None:
            oldest = min((rollout.weights_version for rollout in given), default=self.weights_version)
            return PendingRollouts(self, records, prompts, Generated(list(given)), oldest)
        keys = [record.id if attempt == 0 else f"{record.id} {attempt}" for record in records]
        seeds = [rollout_seed(self.seed, step, key, index) for key in keys for index in range(count)]
        self.engine.wake_up()
        generation = self.engine.start(prompts, sampling_params(config, self.encoder), num_rollouts_per_prompt=count, seeds=seeds)
        return PendingRollouts(self, records, prompts, generation, self.weights_version)

    def in_background(self, pending: PendingRollouts) -> Future[_Graded]:
        """One batch after the other, so that grades do not depend on which is ready first."""
        return self._background.submit(pending.collect_and_grade)


@dataclass(frozen=True, eq=False)
class _Graded:
    rollouts: list[Rollout]
    texts: list[str]
    rewards: list[Reward | None]
    grading: MetricSums


@dataclass(eq=False)
class PendingRollouts:
    """Rollouts on their way, and their grades.

    The leader of a model's ranks waits for both and tells the others: they must agree, and judges cost.
    """

    sampler: Sampler
    records: Sequence[Record]
    prompts: Sequence[EncodedPrompt]
    generation: PendingGeneration
    oldest_version: int  # of the weights that it may have been sampled by
    _result: RolloutBatch | None = field(default=None, init=False, repr=False)

    _graded: Future[_Graded] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.sampler.runtime.is_leader:
            self._grade()

    def result(self) -> RolloutBatch:
        """The graded rollouts, each time the same. A collective over all ranks.

        Raises RolloutError for rollouts of other weights than the engine has had since they were begun.
        """
        if self._result is None:
            self._result = self._settle()
        return self._result

    def _settle(self) -> RolloutBatch:
        sampler = self.sampler
        graded = shared_rollouts(sampler.runtime, self._wait, sampler.restore_weights, self._grade)
        versions = {rollout.weights_version for rollout in graded.rollouts}
        allowed = range(self.oldest_version, max(self.oldest_version, self.sampler.weights_version) + 1)
        if not versions <= set(allowed):
            raise RolloutError(
                f"rollouts come from weights of version {', '.join(map(str, sorted(versions)))}, and the engine has had versions "
                f"{allowed.start} to {allowed.stop - 1} since they were asked for",
                where="rollout",
                remedy="two runs may share a rollout server: give each its own",
            )
        return RolloutBatch(self.records, self.prompts, graded.rollouts, graded.texts, graded.rewards, graded.grading)

    def _grade(self) -> None:
        self._graded = self.sampler.in_background(self)

    def _wait(self) -> _Graded:
        assert self._graded is not None, "the leader collects"
        return self._graded.result()

    def collect_and_grade(self) -> _Graded:
        rollouts = self.generation.collect()
        texts = [self.sampler.encoder.decode(rollout.tokens) for rollout in rollouts]
        grader = self.sampler.grader
        if grader is None:
            return _Graded(rollouts, texts, [None] * len(texts), {})
        rewards = grader.grade(texts, [self.records[rollout.prompt_index] for rollout in rollouts])
        # Not what depends on the answers that this process has seen before: a resumed run has seen fewer.
        grading: MetricSums = {name: value for name, value in grader.metrics().items() if name != "rewards/cache_hits"}
        return _Graded(rollouts, texts, rewards, grading)
