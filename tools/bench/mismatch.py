"""How far a sampler's log-probabilities are from the trainer's, and how much of that experts make that were chosen differently.

    OMP_NUM_THREADS=1 .venv/vllm/bin/python tools/bench/mismatch.py --demo runs/demo [--dir runs/mismatch] [--prompts 64]

`--demo` is a `make demo`, of which the data are taken. Four models, in fp32 and bf16, sampled at temperature 1 by the Megatron
engine and by vLLM:

    digits        8 dense layers, trained on the demo's demonstrations (`--steps` steps of 32)
    digits_moe    the same with 16 experts, 4 a token, trained alike
    deep          24 dense layers, random: every layer adds as much as the last, logits have a standard deviation of 3
    deep_moe      the same with 64 experts, 8 a token, of which the router's logits have a standard deviation of 1.5

The trainer's log-probabilities of the sampled tokens come from packed rows, a prompt with all of its rollouts, as in training.
`replayed` is what is left of the mismatch when the trainer does not choose experts but takes the sampler's, at every token that
the sampler ran through its network; the mode `vllm_fp32_router` is vLLM with a router in fp32, as the trainer's is. Prints one
JSON object; every configuration is a process of its own. Log-ratios are trainer - sampler, in nats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import prism_nemo.engine  # noqa: F401  before megatron
from prism_nemo.algorithms.rollout_correction import mismatch_metrics
from prism_nemo.config.enums import Device, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.config.schema import DataConfig, ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.hf import hf_assets_directory
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.digits_model import write_model_files
from prism_nemo.data.open import open_file
from prism_nemo.engine.runtime import session
from prism_nemo.models.policy import OutputDistribution, PolicyModel
from prism_nemo.models.router import GroupBalancedRouter
from prism_nemo.packing.groups import EncodedPrompt, Group, Segment
from prism_nemo.packing.rows import make_row
from prism_nemo.rollout import megatron
from prism_nemo.rollout.base import Rollout, SamplingParams
from prism_nemo.run_directory import resolve_model_directory

SYSTEM_PROMPT = "<caption> <think> <answer>"
PROMPT, RESPONSE = 64, 48  # tokens, at most
MODELS = ("digits", "digits_moe", "deep", "deep_moe")
MODES = ("megatron", "vllm", "vllm_fp32_router")
Routes = dict[int, Tensor]  # by layer from 0, the experts int64 [tokens, K] that were chosen, ascending


# Models


def write_model(directory: Path, name: str) -> None:
    """Its files and random weights, in HuggingFace's layout."""
    directory.mkdir(parents=True)
    write_model_files(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    deep = name.startswith("deep")
    size = {"num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
    config["text_config"] |= size if deep else {"num_hidden_layers": 8, "intermediate_size": 384}
    if deep:
        config["vision_config"]["out_hidden_size"] = 256
        config["text_config"]["vocab_size"] = 512
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    if name.endswith("_moe"):
        experts = {"num_experts": 64, "num_experts_per_tok": 8} if deep else {"num_experts": 16, "num_experts_per_tok": 4}
        config["text_config"] |= {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 96, **experts}
        config["text_config"] |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
        config |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
        config["vision_config"]["model_type"] = "qwen3_vl_moe"
    path.write_text(json.dumps(config, indent=1))
    write_random_weights(directory, seed=0)
    if deep:
        file = directory / "model.safetensors"
        save_file({key: _scaled(key, tensor) for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def _scaled(name: str, tensor: Tensor) -> Tensor:
    """A language model's matrices scaled so that no layer's part vanishes."""
    if ("language_model" not in name and name != "lm_head.weight") or tensor.dim() < 2:
        return tensor
    inputs = tensor.shape[1]  # of the Hub's experts [E, in, out] too
    goal = {"lm_head.weight": 3.0, "mlp.gate.weight": 1.5}
    gain = next((value for end, value in goal.items() if name.endswith(end)), 1.0)
    deviation = 1.0 if "embed_tokens" in name else gain / inputs**0.5
    return tensor * (deviation / float(tensor.std()))


def prepare(directory: Path, demo: Path, name: str, steps: int) -> Path:
    """The model `name`, written and where it is to be trained, once."""
    base = directory / name / "model"
    if not (base / "model.safetensors").is_file():
        write_model(base, name)
    if name.startswith("deep"):
        return base
    trained = directory / name / "sft"
    status = trained / "status.json"
    if not status.is_file() or json.loads(status.read_text()).get("state") != "finished":
        options = [
            f"experiment.dir={trained}",
            "experiment.progress=false",
            "runtime.device=cpu",
            "runtime.num_threads=1",
            f"model.path={base}",
            "model.precision=fp32",
            f"data.train={demo / 'data' / 'public.jsonl'}",
            f"data.system_prompt={SYSTEM_PROMPT}",
            f"data.max_prompt_length={PROMPT}",
            f"data.max_response_length={RESPONSE}",
            f"trainer.max_steps={steps}",
            "trainer.global_batch_size=32",
            "optimizer.lr=2.0e-3",
            "optimizer.adam_beta2=0.95",
        ]
        subprocess.run([sys.executable, "-m", "prism_nemo", "sft", *options], check=True, stdout=subprocess.DEVNULL)
    return trained


# Routing


class TrainerRoutes:
    """Sees, and with `forced` decides, what Megatron's routers choose, in the order of the forward passes."""

    def __init__(self) -> None:
        self.passes: list[Routes] = []
        self.forced: Routes | None = None  # -1: the router's own choice

    @contextmanager
    def installed(self) -> Iterator[None]:
        own = GroupBalancedRouter.routing

        def routing(router: Any, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            probabilities, choices = own(router, logits, padding_mask)
            layer = router.layer_number - 1
            chosen = choices.nonzero()[:, 1].view(len(choices), -1)
            if layer == 0 or not self.passes or layer in self.passes[-1]:
                self.passes.append({})
            self.passes[-1][layer] = chosen
            if self.forced is None:
                return probabilities, choices
            wanted = torch.where(self.forced[layer] < 0, chosen, self.forced[layer])
            flat = logits.view(len(choices), -1)
            weights = flat.gather(1, wanted).softmax(dim=-1, dtype=torch.float32).type_as(flat)
            return torch.zeros_like(flat).scatter(1, wanted, weights), torch.zeros_like(choices).scatter(1, wanted, True)

        GroupBalancedRouter.routing = routing
        try:
            yield
        finally:
            GroupBalancedRouter.routing = own


def sample_megatron(policy: PolicyModel, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, count: int) -> Any:
    """Rollouts, and each one's routes over its prompt and all of its tokens but the last."""
    megatron._COMPACT_BELOW = 0.0  # row i of every forward pass is sequence i
    routes = TrainerRoutes()
    engine = megatron.MegatronEngine(policy.chunks, device=policy.runtime.device, max_batch_size=len(prompts) * count)
    with routes.installed():
        rollouts = engine.generate(prompts, sampling, num_rollouts_per_prompt=count, seeds=range(len(prompts) * count))
    if not routes.passes:
        return rollouts, None
    lengths = [len(prompt) for prompt in prompts]
    assert len(routes.passes[0][0]) == sum(lengths), "the prompts did not fit into one row"
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    found = []
    for number, rollout in enumerate(rollouts):
        first, length = starts[rollout.prompt_index], lengths[rollout.prompt_index]
        decoded = routes.passes[1 : len(rollout.tokens)]
        found.append(
            {
                layer: torch.cat([chosen[first : first + length], *(step[layer][number : number + 1] for step in decoded)])
                for layer, chosen in routes.passes[0].items()
            }
        )
    return rollouts, found


class VLLMRoutes:
    """What vLLM's routers choose, by request; its own way to return that does not exist in the worker for CPUs."""

    def __init__(self, worker_model: torch.nn.Module, runner: Any) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self._runner = runner
        self.routers = [module for module in worker_model.modules() if isinstance(module, MoERunner)]
        self.tokens: dict[str, list[int]] = {}
        self.chosen: dict[str, list[Routes]] = {}
        for router in self.routers:
            router.router.set_capture_fn(partial(self._see, router.layer_id))

    def _see(self, layer: int, chosen: Tensor) -> None:
        requests = self._runner.input_batch.req_ids
        ends = self._runner.query_start_loc.np[: len(requests) + 1].tolist()
        chosen = chosen.long().sort(dim=-1).values
        for request, first, last in zip(requests, ends[:-1], ends[1:], strict=True):
            steps = self.chosen.setdefault(request, [])
            if layer == 0:
                steps.append({})
                self.tokens.setdefault(request, []).extend(self._runner.input_ids.gpu[first:last].tolist())
            steps[-1][layer] = chosen[first:last].clone()

    def of(self, rollouts: Sequence[Rollout], prompts: Sequence[EncodedPrompt]) -> list[Routes]:
        """Requests are known by the tokens that they ran through the network; equal ones (of other images) ran in their order."""
        by_tokens: dict[tuple[int, ...], list[str]] = {}
        for request, tokens in self.tokens.items():
            by_tokens.setdefault(tuple(tokens), []).append(request)
        found = []
        for rollout in rollouts:
            request = by_tokens[(*prompts[rollout.prompt_index].input_ids.tolist(), *rollout.tokens[:-1].tolist())].pop(0)
            steps = self.chosen[request]
            found.append({layer: torch.cat([step[layer] for step in steps]) for layer in steps[0]})
        return found


def sample_vllm(
    policy: PolicyModel, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, count: int, *, fp32_router: bool
) -> Any:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    settings = VLLMConfig(kv_cache_gb=0.5, enable_prefix_caching=False)  # or prompts are not run through the network each time
    config = RolloutConfig(engine=RolloutEngineKind.vllm, vllm=settings)
    engine = VLLMEngine(config, ServedModel.of(policy, PROMPT + RESPONSE))
    engine.update_weights(policy.hf_tensors(), 0)
    worker = engine._llm.llm_engine.model_executor.driver_worker.worker
    routes = VLLMRoutes(worker.get_model(), worker.model_runner)
    if fp32_router:
        for module in routes.routers:
            gate = module.gate
            gate.forward = lambda x, gate=gate: (torch.nn.functional.linear(x.float(), gate.weight.float()), None)
    seeds = range(len(prompts) * count)
    rollouts = engine.generate(prompts, sampling, num_rollouts_per_prompt=count, seeds=seeds)
    return rollouts, routes.of(rollouts, prompts) if routes.routers else None


# The comparison


def score(
    policy: PolicyModel, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout], sampled: list[Routes] | None
) -> dict[str, Any]:
    """The trainer's side of every rollout's tokens: its log-probabilities, those with the sampler's experts, and who differs."""
    routes = TrainerRoutes()
    columns: dict[str, list[Tensor]] = {"sampler": [], "trainer": [], "replayed": [], "differs": [], "pairs": []}
    with routes.installed():
        for index, prompt in enumerate(prompts):
            numbers = [number for number, rollout in enumerate(rollouts) if rollout.prompt_index == index]
            row = make_row([Group(prompt, tuple(Segment(rollouts[number].tokens, number) for number in numbers))])
            columns["sampler"].append(torch.cat([rollouts[number].log_probs for number in numbers]))
            routes.passes.clear()
            columns["trainer"] += policy.get_inference_log_probs([row])
            if sampled is None:
                continue
            own = routes.passes[0]
            wanted = _in_row([sampled[number] for number in numbers], len(prompt))
            routes.forced = wanted
            columns["replayed"] += policy.get_inference_log_probs([row])
            routes.forced = None
            unequal = torch.stack([(own[layer] != wanted[layer]).any(dim=-1) & (wanted[layer][:, 0] >= 0) for layer in own])
            columns["differs"].append(unequal.any(dim=0)[row.label_source])  # in any layer of the token that predicts
            columns["pairs"].append(unequal[:, (wanted[0][:, 0] >= 0)].flatten())
    return {name: torch.cat(parts) for name, parts in columns.items() if parts}


def _in_row(sampled: list[Routes], prompt: int) -> Routes:
    """The sampler's experts for a row [prompt | rollout | rollout ...]; -1 at each last token, which it never ran."""
    rows: Routes = {}
    for layer, chosen in sampled[0].items():
        unknown = chosen.new_full((1, chosen.shape[1]), -1)
        rows[layer] = torch.cat([chosen[:prompt], *(part for one in sampled for part in (one[layer][prompt:], unknown))])
    return rows


def figures(trainer: Tensor, sampler: Tensor) -> dict[str, float]:
    log_ratio = (trainer - sampler).double()
    ratio = log_ratio.exp()
    found = {name: float(total) / float(count) for name, (total, count) in _pairs(trainer, sampler).items()}
    return {
        "tokens": len(ratio),
        **{name: _rounded(value) for name, value in found.items()},
        "ratio_outside_0.99_1.01": _rounded(float(((ratio < 0.99) | (ratio > 1.01)).double().mean())),
        "ratio_outside_0.8_1.28": _rounded(float(((ratio < 0.8) | (ratio > 1.28)).double().mean())),
        "max_abs_log_ratio": _rounded(float(log_ratio.abs().max())),
    }


def _pairs(trainer: Tensor, sampler: Tensor) -> dict[str, tuple[float, float]]:
    return {name: (float(value[0]), float(value[1])) for name, value in mismatch_metrics(trainer, sampler, thresholds=()).items()}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def measure(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """One model in one precision, sampled in one way."""
    precision = Precision(options.precision)
    runtime_config = RuntimeConfig(device=Device.cpu, num_threads=1)
    with session(ParallelConfig(), runtime_config) as runtime:
        data = DataConfig(system_prompt=SYSTEM_PROMPT, max_prompt_length=PROMPT, max_response_length=RESPONSE)
        assets = hf_assets_directory(resolve_model_directory(path, "policy"))
        prompts_file = options.demo / "data" / "prompts.jsonl"
        encoder = ChatEncoder.from_directory(assets, data, image_root=prompts_file.parent)
        policy = PolicyModel(
            ModelConfig(path=str(path), precision=precision),
            ParallelConfig(),
            runtime,
            OutputDistribution(temperature=1.0, banned_token_ids=encoder.banned_token_ids),
        )
        records = open_file(str(prompts_file), data, required=()).records[: options.prompts]
        prompts = [encoder.encode_prompt(record) for record in records]
        length = RESPONSE if not options.model.startswith("deep") else 24
        sampling = SamplingParams(1.0, 1.0, 0, length, encoder.end_token_id, encoder.banned_token_ids)
        if options.mode == "megatron":
            rollouts, sampled = sample_megatron(policy, prompts, sampling, options.rollouts)
        else:
            fp32 = options.mode == "vllm_fp32_router"
            rollouts, sampled = sample_vllm(policy, prompts, sampling, options.rollouts, fp32_router=fp32)
        found = score(policy, prompts, rollouts, sampled)
    result: dict[str, Any] = {"model": options.model, "precision": precision.value, "sampler": options.mode}
    result["entropy_estimate"] = _rounded(-float(found["sampler"].mean()))
    result |= figures(found["trainer"], found["sampler"])
    if sampled is not None:
        differs = found["differs"]
        result["token_layers_routed_differently"] = _rounded(float(found["pairs"].double().mean()))
        result["tokens_routed_differently_in_any_layer"] = _rounded(float(differs.double().mean()))
        for name, which in (("routed_alike", ~differs), ("routed_differently", differs)):
            if which.any():
                result[name] = figures(found["trainer"][which], found["sampler"][which])
        result["replayed"] = figures(found["replayed"], found["sampler"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--dir", type=Path, default=Path("runs/mismatch"), help="where the models are written and trained")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=4, help="of each prompt")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--precision", choices=[one.value for one in Precision], help="only this one")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.demo, options.dir = options.demo.resolve(), options.dir.resolve()
    if options.mode:
        path = prepare(options.dir, options.demo, options.model, options.steps)
        print(json.dumps(measure(options, path)), flush=True)
        return
    results = []
    for model in options.models:
        prepare(options.dir, options.demo, model, options.steps)
        for precision in [options.precision] if options.precision else ["fp32", "bf16"]:
            for mode in options.modes:
                if mode == "vllm_fp32_router" and not (model.endswith("_moe") and precision == "bf16"):
                    continue
                results.append(_alone(options, model, precision, mode))
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread"
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, "results": results}, indent=1))


def _alone(options: argparse.Namespace, model: str, precision: str, mode: str) -> Any:
    command = [sys.executable, __file__, "--model", model, "--precision", precision, "--mode", mode]
    for name in ("demo", "dir", "steps", "prompts", "rollouts"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
