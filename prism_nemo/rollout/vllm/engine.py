"""`RolloutEngine` by vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from prism_nemo.config.enums import Draws
from prism_nemo.config.rollout import RolloutConfig
from prism_nemo.convert.qwen3_vl import ExpertLayout, hf_shapes
from prism_nemo.models.weights import HFTensors
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import InProcessEngine, Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.vllm.requests import Request, engine_input, request_parameters
from prism_nemo.rollout.vllm.start import ServedModel, start_engine


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
        self._asleep = False
        self._calls = 0
        size = config.vllm.tensor_model_parallel_size
        ranks = 1 if model.group is None else model.group.size()
        if ranks % size:
            raise RolloutError(
                f"{ranks} ranks hold one model, which do not divide into engines of {size}",
                where="rollout.vllm.tensor_model_parallel_size",
                remedy="choose a divisor of tensor x pipeline x context parallel size",
            )
        self._llm = start_engine(config, model)
        place = 0 if model.group is None else model.group.rank()
        self._num_engines, self._number, self._speaks = ranks // size, place // size, place % size == 0

    # Weights

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. Raises RolloutError for missing or unknown tensors; then there are no weights."""
        self._weights_version = None
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        if isinstance(tensors, HFTensors):  # rather than transposed here and transposed back there
            tensors = tensors.with_separate_experts()
        seen: set[str] = set()

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                seen.add(name)
                yield name, tensor

        (unfilled,) = set(self._llm.collective_rpc("load_prism_weights", args=(noted(),)))
        expected = min(self._names, key=lambda names: len(names ^ seen))  # vLLM reads experts in either layout
        if unfilled or seen != expected:
            wrong = sorted(seen ^ expected) or sorted(unfilled)
            raise RolloutError(
                f"{len(wrong)} tensors are missing or unknown, {wrong[0]} among them",
                where="rollout.engine",
                remedy="the engine must be of the policy's own model",
            )
        # All that was computed by the old weights: keys and values, features of images.
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._weights_version = version

    def sleep(self) -> bool:
        """Gives the GPU's memory back, weights included: they must be updated before more is generated. Nothing on a CPU."""
        if self._model.device.type == "cpu":
            return True
        self._llm.sleep(level=2)
        self._asleep, self._weights_version = True, None
        return False

    def wake_up(self) -> None:
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    # Generation

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`.

        Raises RolloutError when logits are not finite, for a prompt whose image tokens are not those of its images, for one that
        is too long, and without weights.
        """
        assert len(seeds) == len(prompts) * num_rollouts_per_prompt, "one seed per rollout"
        version = self._weights_version
        if version is None:
            raise RolloutError("the engine has no weights", where="rollout", remedy="call update_weights first")
        numbers = [
            index * num_rollouts_per_prompt + member
            for index in range(self._number, len(prompts), self._num_engines)
            for member in range(num_rollouts_per_prompt)
        ]
        self._check_lengths(prompts, sampling)
        inputs = {index: engine_input(prompts[index], self._merge) for index in {n // num_rollouts_per_prompt for n in numbers}}
        requests = [Request(n, n // num_rollouts_per_prompt, prompts[n // num_rollouts_per_prompt]) for n in numbers]
        self._run(requests, inputs, sampling, seeds)
        return self._share([(request.number, request.rollout(version)) for request in requests])

    def _check_lengths(self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams) -> None:
        longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
        if longest + sampling.max_new_tokens > self._model.max_length:
            raise RolloutError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} more do not fit into {self._model.max_length}",
                where="data.max_prompt_length, data.max_response_length",
            )

    def _run(self, requests: Sequence[Request], inputs: dict[int, Any], sampling: SamplingParams, seeds: Sequence[int]) -> None:
        """Generates until every response has ended or time is up."""
        engine = self._llm.llm_engine
        self._calls += 1
        shared = self._config.vllm.draws is Draws.shared
        running = {}
        for request in requests:
            identifier = f"{self._calls}-{request.number}"
            parameters = request_parameters(sampling, seeds[request.number], request.number if shared else None)
            engine.add_request(identifier, inputs[request.prompt_index], parameters)
            running[identifier] = request
        limit = sampling.time_limit_seconds
        deadline = float("inf") if limit is None else time.monotonic() + limit
        try:
            while running and (time.monotonic() < deadline or not all(request.tokens for request in running.values())):
                for output in engine.step():
                    if running[output.request_id].take(output):
                        del running[output.request_id]
        except BaseException:
            engine.abort_request(list(running))
            raise
        if running:
            engine.abort_request(list(running))
            for request in running.values():
                request.finish_reason = "timeout"
        if shared:
            drawn = self._llm.collective_rpc("take_prism_log_probs")[0]
            for request in requests:
                request.log_probs = drawn.get(request.number, [])[: len(request.tokens)]

    def _share(self, mine: list[tuple[int, Rollout]]) -> list[Rollout]:
        """All rollouts in order, on every rank of the model."""
        parts = [mine]
        if self._model.group is not None:
            parts *= self._model.group.size()
            dist.all_gather_object(parts, mine if self._speaks else [], group=self._model.group)
        return [rollout for _, rollout in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]
