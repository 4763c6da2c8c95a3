"""`RolloutEngine` by vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from prism_nemo.config.rollout import RolloutConfig
from prism_nemo.convert.qwen3_vl import ExpertLayout, hf_shapes
from prism_nemo.errors import PrismError
from prism_nemo.models.weights import HFTensors
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import InProcessEngine, Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.vllm.decoding import Decoder, EngineBroken, Generation
from prism_nemo.rollout.vllm.requests import Request, engine_input
from prism_nemo.rollout.vllm.start import ServedModel, give_back, start_engine

T = TypeVar("T")


class VLLMEngine(InProcessEngine):
    """`RolloutEngine`. The ranks that hold one model deal its prompts to their engines, and then share the rollouts.

    The library's engine lives on until the process ends: to end it would end the process groups, which are the training's.
    """

    def __init__(self, config: RolloutConfig, model: ServedModel) -> None:
        """Starts the engine, without weights. A collective of all ranks. Raises RolloutError when vLLM does not start."""
        self._config = config
        self._model = model
        self._merge = model.config["vision_config"]["spatial_merge_size"] ** 2
        self._names = [frozenset(hf_shapes(model.config, layout)) for layout in (ExpertLayout.hub, ExpertLayout.separate)]
        self._weights_version: int | None = None  # None: there are none, or parts of two
        size = config.vllm.tensor_model_parallel_size
        ranks = 1 if model.group is None else model.group.size()
        if ranks % size:
            raise RolloutError(
                f"{ranks} ranks hold one model, which do not divide into engines of {size}",
                where="rollout.vllm.tensor_model_parallel_size",
                remedy="choose a divisor of tensor x pipeline x context parallel size; in a rollout server that is 1",
            )
        _check_neighbours(model.group, size)
        self._llm = start_engine(config, model)
        asleep = self._llm.llm_engine.is_sleeping()
        self._asleep = {"weights", "kv_cache"} if asleep else set()  # what memory is given back, in vLLM's words
        self._closed = False
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._decoder = Decoder(self._llm, config.vllm.draws, shares_scheduling=several and size > 1)
        place = 0 if model.group is None else model.group.rank()
        self._num_engines, self._number, self._speaks = ranks // size, place // size, place % size == 0

    # Weights

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. Raises RolloutError for missing or unknown tensors; then there are no weights."""
        assert self._decoder.idle, "rollouts of the weights before are being generated"
        self._weights_version = None
        self._wake("weights")
        self._on_all_ranks(lambda: self._load(tensors))
        # All that was computed by the old weights: keys and values, features of images.
        forgotten = self._llm.reset_prefix_cache()
        assert forgotten, "vLLM keeps keys and values of the weights before"
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._weights_version = version

    def _load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        if isinstance(tensors, HFTensors):  # rather than transposed here and transposed back there
            tensors = tensors.with_separate_experts()
        seen: set[str] = set()

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                seen.add(name)
                yield name, tensor

        unfilled = frozenset[str]().union(*self._llm.collective_rpc("load_prism_weights", args=(noted(),)))
        expected = min(self._names, key=lambda names: len(names ^ seen))  # vLLM reads experts in either layout
        if unfilled or seen != expected:
            wrong = sorted(seen ^ expected) or sorted(unfilled)
            raise RolloutError(
                f"{len(wrong)} tensors are missing or unknown, {wrong[0]} among them",
                where="rollout.engine",
                remedy="the engine must be of the policy's own model",
            )

    def sleep(self) -> bool:
        """Gives the GPU's memory back, weights included: they must be updated before more is generated. Nothing on a CPU."""
        if self._model.device.type == "cpu":
            return True
        if "weights" not in self._asleep:
            self.wake_up()  # what sleeps in part cannot fall asleep
            self._llm.sleep(level=2)
            self._asleep, self._weights_version = {"weights", "kv_cache"}, None
        return False

    def wake_up(self) -> None:
        """Takes the memory of the cache back. That of the weights comes with their update, be it before or after."""
        self._wake("kv_cache")

    def _wake(self, memory: str) -> None:
        """vLLM schedules nothing until all of its memory is there again."""
        if memory in self._asleep:
            self._llm.wake_up(tags=[memory])
            self._asleep.remove(memory)

    def close(self) -> None:
        """The engine sleeps, for the next one of its kind in this process."""
        if not self._closed and self._decoder.idle:
            self._closed = True
            if self._decoder.spoilt:
                self.wake_up()
                self._decoder.clean()
            self.sleep()
            give_back(self._llm, self._config, self._model)

    # Generation

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`.

        Raises RolloutError when logits are not finite, for a prompt whose image tokens are not those of its images, for one that
        is too long, and without weights; on every rank of the model, whichever had the prompt.
        """

        def own() -> list[tuple[int, Rollout]]:
            generation = self.add(prompts, sampling, num_rollouts_per_prompt=num_rollouts_per_prompt, seeds=seeds)
            try:
                while not generation.done:
                    self.step()
            except BaseException:
                self.drop(generation)
                raise
            return generation.numbered()

        parts = self._on_all_ranks(own)
        return [rollout for _, rollout in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]

    def add(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> Generation:
        """See `ContinuousEngine.add`. Adds the prompts that are dealt to this engine: all, where it is alone."""
        assert len(seeds) == len(prompts) * num_rollouts_per_prompt, "one seed per rollout"
        if self._weights_version is None:
            raise RolloutError("the engine has no weights", where="rollout", remedy="call update_weights first")
        assert not self._asleep, "generate() while asleep"
        self._check_lengths(prompts, sampling)
        dealt = range(self._number, len(prompts), self._num_engines)
        inputs = {index: engine_input(prompts[index], self._merge) for index in dealt}
        requests = [
            Request(index * num_rollouts_per_prompt + member, index, prompts[index])
            for index in dealt
            for member in range(num_rollouts_per_prompt)
        ]
        return self._decoder.add(requests, inputs, sampling, seeds, self._weights_version)

    def step(self) -> None:
        self._decoder.step()

    def drop(self, generation: Generation) -> None:
        self._decoder.drop(generation)

    def _check_lengths(self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams) -> None:
        longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
        if longest + sampling.max_new_tokens > self._model.max_length:
            raise RolloutError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} more do not fit into {self._model.max_length}",
                where="data.max_prompt_length, data.max_response_length",
            )

    def _on_all_ranks(self, make: Callable[[], T]) -> list[T]:
        """What `make()` returned on each engine of the ranks that hold one model. What it raises on one is raised on all.

        But for EngineBroken: there are ranks that cannot be told, and that one rank ends is how they hear of it.
        """
        group = self._model.group
        if group is None:
            return [make()]
        made: list[T] = []
        problem: Exception | None = None
        try:
            made = [make()]
        except EngineBroken:
            raise
        except Exception as error:
            problem = error
        told: list[tuple[list[T], PrismError | None]] = [([], None)] * group.size()
        dist.all_gather_object(told, (made if self._speaks else [], _tellable(problem)), group=group)
        if problem is not None:
            raise problem
        for _, found in told:
            if found is not None:
                raise found
        return [part for parts, _ in told for part in parts]


def _tellable(problem: Exception | None) -> PrismError | None:
    """For the other ranks, which may not be able to make up the exception itself."""
    if problem is None or isinstance(problem, PrismError):
        return problem
    return RolloutError(f"on another rank: {type(problem).__name__}: {problem}", where="rollout")


def _check_neighbours(group: dist.ProcessGroup | None, size: int) -> None:
    """vLLM makes an engine of ranks that follow each other. Raises RolloutError where those hold different models."""
    if group is None or size == 1:
        return
    ranks = dist.get_process_group_ranks(group)
    for first in range(0, len(ranks), size):
        if ranks[first] % size or ranks[first : first + size] != list(range(ranks[first], ranks[first] + size)):
            raise RolloutError(
                f"an engine of {size} takes ranks that follow each other, and ranks {', '.join(map(str, ranks))} hold one model",
                where="rollout.vllm.tensor_model_parallel_size",
                remedy="choose tensor_model_parallel_size of the policy, or a divisor of it",
            )
