"""`prism-nemo convert verify`: whether a HuggingFace directory and a checkpoint are the same model.

Every parameter's bytes are hashed on both sides, in the checkpoint's form, tensor by tensor. Then the model is built once, filled
from one side and from the other, and both must compute the same numbers on sample inputs, text alone and text with an image. At
last all files of the checkpoint, the optimizer's among them, are compared with the hashes that its writer left.
"""

from __future__ import annotations

import argparse
import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_nemo.convert import manifest
from prism_nemo.convert.commands import find_checkpoint, headless
from prism_nemo.convert.hf import load_model_config
from prism_nemo.convert.hf_reader import HFReader, has_score_head
from prism_nemo.convert.pieces import byte_chunks
from prism_nemo.convert.qwen3_vl import mappings
from prism_nemo.convert.shards import THREADS
from prism_nemo.convert.sources import CheckpointSource, HFSource, Source
from prism_nemo.convert.torch_dist import TorchDistCheckpoint
from prism_nemo.printable import printable

_RESPONSE = 14  # tokens of the sample responses


@dataclass
class Verdict:
    """What was compared, and what was not the same."""

    tensors: int = 0
    different: list[str] = field(default_factory=list)
    samples: dict[str, float] = field(default_factory=dict)  # largest difference of each sample's outputs
    files: int = 0  # of the checkpoint, that have a hash in its manifest
    damaged: list[str] = field(default_factory=list)  # files that are not what was written

    @property
    def same(self) -> bool:
        return not (self.different or self.damaged) and all(difference == 0.0 for difference in self.samples.values())


def run(options: argparse.Namespace) -> bool:
    """Prints what was found; True when all is the same."""
    verdict = verify(options.hf, options.checkpoint, model=options.model, outputs=not options.tensors_only)
    for name in verdict.different:
        print(f"differs: {printable(name)}")
    print(f"tensors: {verdict.tensors - len(verdict.different)} of {verdict.tensors} are equal, bit for bit")
    for sample, difference in verdict.samples.items():
        print(f"outputs on {sample}: {'equal' if difference == 0 else f'differ by up to {difference:g}'}")
    for problem in verdict.damaged:
        print(printable(problem))
    if verdict.files:
        print(f"files: {verdict.files - len(verdict.damaged)} of {verdict.files} are what was written")
    print("the same model" if verdict.same else "NOT the same model")
    return verdict.same


def verify(hf: Path, checkpoint: Path, *, model: str | None = None, outputs: bool = True) -> Verdict:
    """Compares the two. Raises CheckpointError when one of them cannot be read, or they are of different kinds of model."""
    directory = find_checkpoint(checkpoint, model)
    problems = manifest.problems(directory, contents=False)  # contents at last: a changed byte is named by its tensor first
    if problems:
        raise manifest.damaged(problems[0], directory)
    verdict = Verdict()
    with ExitStack() as stack:
        reader = stack.enter_context(HFReader(hf))
        score_head = has_score_head(reader)
        config = load_model_config(directory)
        theirs = load_model_config(hf)
        theirs = headless(theirs) if score_head else theirs
        differing = _config_differences(theirs, config)
        verdict.different += [f"config.json: {key}" for key in differing]
        if differing:
            return verdict  # they have other tensors
        stored = CheckpointSource(TorchDistCheckpoint(directory), config, score_head=score_head)
        stack.callback(stored.io.close)
        source = HFSource(reader, config, score_head=score_head)
        if source.dtype != stored.dtype:
            verdict.different.append(f"types: {source.dtype} and {stored.dtype}")
        _compare_tensors(source, stored, config, score_head, verdict)
    if outputs:
        verdict.samples = _compare_outputs(hf, directory, config, score_head, stored.dtype.torch)
    verdict.files, verdict.damaged = manifest.count(directory), manifest.problems(directory)
    return verdict


def _config_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys of the two parts of the model that say different things; how the weights are stored is not one of them."""
    ignored = {"dtype", "torch_dtype", "transformers_version", "tie_word_embeddings"}
    return sorted(
        f"{part}.{key}"
        for part in ("text_config", "vision_config")
        for key in one[part].keys() & other[part].keys()
        if key not in ignored and one[part][key] != other[part][key]
    )


def _compare_tensors(one: Source, other: Source, config: dict[str, Any], score_head: bool, verdict: Verdict) -> None:
    shapes = {
        name: mapping.megatron_shape for mapping in mappings(config, score_head=score_head) for name in mapping.megatron_names
    }

    def equal(name: str) -> bool:
        return tensor_hash(one, name, shapes[name][0]) == tensor_hash(other, name, shapes[name][0])

    with ThreadPoolExecutor(THREADS) as pool:
        for name, same in zip(shapes, pool.map(equal, shapes), strict=True):
            if not same:
                verdict.different.append(name)
    verdict.tensors = len(shapes)


def tensor_hash(source: Source, name: str, rows: int) -> str:
    """SHA-256 of a parameter's bytes in the checkpoint's form."""
    digest = hashlib.sha256()
    for chunk in byte_chunks(source.pieces(name, 0, rows), source.io):
        digest.update(chunk)
    return digest.hexdigest()


def _compare_outputs(hf: Path, directory: Path, config: dict[str, Any], score_head: bool, dtype: torch.dtype) -> dict[str, float]:
    """The largest absolute difference of log-probabilities (of scores, for a discriminator) on each sample."""
    from prism_nemo.config.enums import Device, Precision
    from prism_nemo.config.schema import DiscriminatorConfig, ParallelConfig, RuntimeConfig
    from prism_nemo.engine.runtime import session
    from prism_nemo.models.discriminator import DiscriminatorModule
    from prism_nemo.models.policy import OutputDistribution, PolicyModule
    from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
    from prism_nemo.models.weights import load_hf_weights, load_weights

    precision = Precision.bf16 if dtype == torch.bfloat16 else Precision.fp32
    shape = Qwen3VLShape.from_hf(config)
    parallel = ParallelConfig()
    with session(parallel, RuntimeConfig(device=Device.auto)) as runtime:
        module: Any
        if score_head:
            module = DiscriminatorModule(shape, parallel, DiscriminatorConfig(precision=precision))
        else:
            module = PolicyModule(shape, parallel, precision)
        module.to(runtime.device).eval()
        rows = {name: row.to(runtime.device) if hasattr(row, "to") else row for name, row in sample_rows(shape).items()}

        def outputs() -> dict[str, Tensor]:
            with torch.no_grad():
                if score_head:
                    return {name: module(row, 1.0, None).cpu() for name, row in rows.items()}
                return {name: module(row, OutputDistribution(), False).log_probs.cpu() for name, row in rows.items()}

        load_hf_weights(module, hf, config, score_head=score_head)
        first = outputs()
        load_weights(module, directory, config, score_head=score_head)
        second = outputs()
    return {name: float((first[name] - second[name]).abs().max()) for name in first}


def sample_rows(shape: Any) -> dict[str, Any]:
    """Random text, and random text around a random image; the same every time."""
    from prism_nemo.packing.groups import EncodedPrompt, Group, Segment, SegmentKind, text_prompt
    from prism_nemo.packing.positions import mrope_positions
    from prism_nemo.packing.rows import make_row

    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(0, min(shape.vocab_size, 1000) // 2, (length,), generator=generator)  # no special ones

    def row(prompt: EncodedPrompt) -> Any:
        return make_row([Group(prompt, (Segment(tokens(_RESPONSE), sample=0, kind=SegmentKind.PERCEPTION),))])

    merge = shape.vision.spatial_merge_size
    grid = torch.tensor([[1, 2 * merge, 3 * merge]])
    ids = torch.cat([tokens(4), torch.full((6,), shape.image_token_id), tokens(3)])
    mask = ids == shape.image_token_id
    image = EncodedPrompt(
        input_ids=ids,
        position_ids=mrope_positions(ids, mask, grid, spatial_merge_size=merge),
        image_mask=mask,
        pixel_values=torch.randn(int(grid.prod()), shape.vision.patch_width, generator=generator),
        image_grid_thw=grid,
    )
    return {"text": row(text_prompt(tokens(12), shape.vision.patch_width)), "text and an image": row(image)}
