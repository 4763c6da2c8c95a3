"""The vision tower: patches of any number of images of any size -> merged visual tokens and deepstack features."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prism_nemo.engine.attention import ImageAttention
from prism_nemo.models.context import RowContext
from prism_nemo.models.qwen3_vl.config import VisionShape
from prism_nemo.models.qwen3_vl.rope import vision_cos_sin
from prism_nemo.models.qwen3_vl.spec import LayerNorm, vision_layer_spec


class PatchEmbedding(MegatronModule):
    """One linear map of a flattened patch (a Conv3d whose kernel is its stride), kept in the convolution's shape."""

    def __init__(self, shape: VisionShape, config: TransformerConfig) -> None:
        super().__init__(config=config)
        kernel = (shape.temporal_patch_size, shape.patch_size, shape.patch_size)
        self.proj = torch.nn.Conv3d(shape.in_channels, shape.hidden_size, kernel, stride=kernel, dtype=config.params_dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[P, patch_width] -> [P, hidden]."""
        weight = self.proj.weight.flatten(1)
        return torch.nn.functional.linear(pixel_values.to(weight.dtype), weight, self.proj.bias)


class PatchMerger(MegatronModule):
    """Four neighbouring patches -> one visual token. `norm_after_merge`: the deepstack mergers' order."""

    def __init__(self, shape: VisionShape, config: TransformerConfig, tp_group: object, *, norm_after_merge: bool) -> None:
        super().__init__(config=config)
        self.width = shape.hidden_size * shape.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.patch_norm = LayerNorm(config, self.width if norm_after_merge else shape.hidden_size, config.layernorm_epsilon)
        linear = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": False, "tp_group": tp_group}
        self.linear_fc1 = ColumnParallelLinear(self.width, self.width, gather_output=False, **linear)
        self.linear_fc2 = RowParallelLinear(self.width, shape.out_hidden_size, input_is_parallel=True, **linear)

    def forward(self, patches: Tensor) -> Tensor:
        """[P, hidden] -> [P / 4, language hidden]."""
        if self.norm_after_merge:
            merged = self.patch_norm(patches.view(-1, self.width))
        else:
            merged = self.patch_norm(patches).view(-1, self.width)
        hidden, _ = self.linear_fc1(merged)
        return self.linear_fc2(torch.nn.functional.gelu(hidden))[0]  # exact (erf) GELU, unlike the blocks


class VisionBlock(TransformerBlock):
    """The vision layers, with a merger tapping some of them."""

    def __init__(self, shape: VisionShape, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        layers: list[ModuleSpec] = [vision_layer_spec()] * shape.depth
        super().__init__(
            config, TransformerBlockSubmodules(layer_specs=layers), post_layer_norm=False, pg_collection=pg_collection
        )
        self.deepstack_layers = shape.deepstack_layers
        self.deepstack_merger_list = torch.nn.ModuleList(
            [PatchMerger(shape, config, pg_collection.tp, norm_after_merge=True) for _ in shape.deepstack_layers]
        )

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], context: RowContext) -> tuple[Tensor, list[Tensor]]:
        """[P, 1, hidden] -> the last layer's output and one [P / 4, language hidden] feature per tapped layer."""
        features = []
        for index, layer in enumerate(self.layers):
            hidden = layer.run(hidden, rotary, context)
            if index in self.deepstack_layers:
                merger = self.deepstack_merger_list[self.deepstack_layers.index(index)]
                features.append(merger(hidden.squeeze(1)))
        return hidden, features

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron's block takes children other than its layers for replicated ones; the mergers are cut over ranks."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for index, merger in enumerate(self.deepstack_merger_list):
            assert isinstance(merger, PatchMerger)
            state.update(merger.sharded_state_dict(f"{prefix}deepstack_merger_list.{index}.", sharded_offsets, metadata))
        return state


class Qwen3VLVisionModel(MegatronModule):
    def __init__(self, shape: VisionShape, config: TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.shape = shape
        self.patch_embed = PatchEmbedding(shape, config)
        self.pos_embed = torch.nn.Embedding(shape.num_position_embeddings, shape.hidden_size, dtype=config.params_dtype)
        self.decoder = VisionBlock(shape, config, pg_collection)
        self.merger = PatchMerger(shape, config, pg_collection.tp, norm_after_merge=False)

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens [V, language hidden] and deepstack features, each alike, of images in order.

        pixel_values float [P, patch_width], image_grid_thw int64 [images, 3]; P is the sum of the grids, V = P / merge^2.
        """
        grids = image_grid_thw.tolist()
        rows, columns = patch_coordinates(grids, self.shape.spatial_merge_size, pixel_values.device)
        embedded = self.patch_embed(pixel_values) + self._position_embedding(grids, rows, columns)
        rotary = vision_cos_sin(rows, columns, head_dim=self.shape.hidden_size // self.shape.num_heads)
        frames = tuple(height * width for time, height, width in grids for _ in range(time))
        context = RowContext(attention=ImageAttention(frames, pixel_values.device))
        hidden, features = self.decoder(embedded.unsqueeze(1), rotary, context)
        return self.merger(hidden.squeeze(1)), features

    def _position_embedding(self, grids: list[list[int]], rows: Tensor, columns: Tensor) -> Tensor:
        """The learned square table, resampled bilinearly (corners aligned) to every image's grid, [P, hidden].

        Weights and sum in fp32, then cast: transformers 5.x's arithmetic.
        """
        side = int(self.shape.num_position_embeddings**0.5)
        steps = torch.tensor([time * height * width for time, height, width in grids], device=rows.device)
        heights, widths = (
            torch.tensor([grid[axis] for grid in grids], device=rows.device).repeat_interleave(steps) for axis in (1, 2)
        )
        y = rows * ((side - 1) / (heights - 1).clamp(min=1))
        x = columns * ((side - 1) / (widths - 1).clamp(min=1))
        top, left = y.long(), x.long()
        bottom, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
        down, across = y - top, x - left
        index = torch.stack([top * side + left, top * side + right, bottom * side + left, bottom * side + right], dim=1)
        weight = torch.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], dim=1)
        table = self.pos_embed(index)  # [P, 4, hidden]
        return (table * weight.unsqueeze(-1)).sum(dim=1).to(self.pos_embed.weight.dtype)


def patch_coordinates(grids: list[list[int]], merge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [P], of every patch; patches come merge block by merge block."""
    rows, columns = [], []
    for time, height, width in grids:
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        blocks = (height // merge, merge, width // merge, merge)
        rows.append(row.reshape(blocks).transpose(1, 2).flatten().repeat(time))
        columns.append(column.reshape(blocks).transpose(1, 2).flatten().repeat(time))
    return torch.cat(rows).to(device), torch.cat(columns).to(device)
