"""A small random model that vLLM can serve too: with a tokenizer, and heads of a width that its CPU kernels know; and prompts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers.rows import build_model, one_rank
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_nemo.convert.hf import load_model_config
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.digits_model import write_model_files
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.groups import EncodedPrompt, text_prompt
from prism_nemo.packing.positions import mrope_positions

MAX_LENGTH = 256  # tokens of a prompt and its response
_WIDTH = 3 * 2 * 16**2  # of a patch
_EXPERTS = {
    "model_type": "qwen3_vl_moe_text",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}


@dataclass(frozen=True, eq=False)
class Served:
    """A model's directory, its config.json, and the ids of tokens that are not text."""

    directory: Path
    config: dict[str, Any]
    keep: tempfile.TemporaryDirectory[str]

    @property
    def special(self) -> tuple[int, ...]:
        """What is never sampled: placeholders."""
        return self.config["image_token_id"], self.config["video_token_id"]

    def prompt(self, images: Sequence[tuple[int, int]], *, seed: int, text_length: int = 4) -> EncodedPrompt:
        """Text, image, text, …; `images` are (rows, columns) of patches."""
        generator = torch.Generator().manual_seed(seed)

        def text(length: int) -> Tensor:
            return torch.randint(10, 50, (length,), generator=generator)

        if not images:
            return text_prompt(text(text_length), _WIDTH)
        image, start, end = (self.config[f"{name}_token_id"] for name in ("image", "vision_start", "vision_end"))
        parts = [text(text_length)]
        for rows, columns in images:
            parts += [torch.tensor([start, *[image] * (rows * columns // 4), end]), text(text_length)]
        ids = torch.cat(parts)
        grid = torch.tensor([[1, rows, columns] for rows, columns in images])
        return EncodedPrompt(
            input_ids=ids,
            position_ids=mrope_positions(ids, ids == image, grid, spatial_merge_size=2),
            image_mask=ids == image,
            pixel_values=torch.randn(int(grid.prod(dim=1).sum()), _WIDTH, generator=generator),
            image_grid_thw=grid,
        )

    @property
    def prompts(self) -> tuple[EncodedPrompt, ...]:
        """Several images, one and none, in prompts of different lengths."""
        return (
            self.prompt([(4, 6), (8, 4)], seed=1),
            self.prompt([(6, 4)], seed=2, text_length=2),
            self.prompt([], seed=3, text_length=11),
            self.prompt([(2, 2), (4, 4), (2, 8)], seed=4, text_length=3),
            self.prompt([], seed=5, text_length=1),
            self.prompt([(8, 8)], seed=6, text_length=40),  # more than a block of vLLM's cache
        )

    def model(self) -> Qwen3VLModel:
        one_rank()
        return build_model(self.directory)

    def tensors(self, seed: int | None = None) -> dict[str, Tensor]:
        """The weights by HuggingFace's names; of a seed, others for the same model."""
        found = load_file(self.directory / "model.safetensors")
        if seed is None:
            return found
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor + torch.randn(tensor.shape, generator=generator) * (0.2 if tensor.dim() == 1 else 0.05)
            for name, tensor in found.items()
        }


@cache
def served(*, experts: bool = False, tied: bool = True) -> Served:
    """All parameters are random, norms and biases too: none may be left out unseen."""
    keep = tempfile.TemporaryDirectory(prefix="served-qwen3vl-")
    directory = Path(keep.name) / "model"
    directory.mkdir()
    write_model_files(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    if experts:
        config |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
        config["text_config"] |= _EXPERTS
        config["vision_config"]["model_type"] = "qwen3_vl_moe"
    path.write_text(json.dumps(config))
    write_random_weights(directory, seed=0)
    result = Served(directory, load_model_config(directory), keep)
    save_file(result.tensors(seed=0), directory / "model.safetensors", metadata={"format": "pt"})
    return result
