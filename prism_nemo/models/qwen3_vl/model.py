"""Qwen3-VL on Megatron-Core: vision tower and language model over one packed row."""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.engine.attention import RowAttention
from prism_nemo.models.context import RoutingContext, RowContext
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.fp8 import LOCAL, LayerKind
from prism_nemo.models.qwen3_vl.language import Qwen3VLLanguageModel, gather_rows
from prism_nemo.models.qwen3_vl.spec import set_recompute
from prism_nemo.models.qwen3_vl.vision import Qwen3VLVisionModel
from prism_nemo.packing.rows import PackedRow
from prism_nemo.packing.shards import RowShard, share_out


class Qwen3VLModel(MegatronModule):
    """Hidden states of a packed row. What is read from them (log-probabilities, scores) is the subclass's or caller's."""

    def __init__(
        self,
        shape: Qwen3VLShape,
        parallel: ParallelConfig,
        precision: Precision,
        *,
        output_head: bool = True,
        vp_stage: int | None = None,
        layers: LayerKind = LOCAL,
    ) -> None:
        shape.check_layout(parallel)
        layers.check_sizes(shape, parallel)
        super().__init__(config=shape.language_config(parallel, precision, layers))
        self.shape = shape
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        if self.pre_process:
            self.vision_model = Qwen3VLVisionModel(shape.vision, shape.vision_config(parallel, precision), self.pg_collection)
        self.language_model = Qwen3VLLanguageModel(
            shape,
            self.config,
            self.pg_collection,
            pre_process=self.pre_process,
            post_process=self.post_process,
            output_head=output_head,
            vp_stage=vp_stage,
            kind=layers,
        )
        _mark_cut_weights(self)
        set_recompute(self, parallel)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """What the previous pipeline stage sent (Megatron's schedules call this)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Megatron reduces its gradient over the first and last pipeline stage."""
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        return self.language_model.share_embeddings_and_output_weights

    def row_context(self, row: PackedRow, routing: RoutingContext | None) -> RowContext:
        """What the layers need to know about a row that is cut over the context-parallel ranks."""
        device = row.input_ids.device
        group = self.pg_collection.cp
        if group.size() == 1:
            return RowContext(RowAttention(row.layout, device), routing, fp8=True)
        shard = RowShard.of(row.layout.length, group.rank(), group.size(), device)
        attention = RowAttention(row.layout, device, shard, group)
        return RowContext(attention, None if routing is None else routing.of_shard(shard, group), shard=shard, fp8=True)

    def hidden_at(self, hidden: Tensor, index: Tensor, context: RowContext) -> tuple[Tensor, Tensor | None]:
        """Hidden states [n, hidden] of those of the row's tokens at `index` int64 [N] that this context-parallel rank holds.

        And which those are, bool [N]; None: all. What is computed from them goes to `over_context_ranks`.
        """
        here = None
        if context.shard is not None:
            here, index = context.shard.locate(index)
        return gather_rows(hidden, index, self.config, self.pg_collection.tp), here

    def over_context_ranks(self, values: Tensor, here: Tensor | None) -> Tensor:
        """Values [n] of the tokens that are here -> [N] of all, on every rank; each rank's gradient is that of its own."""
        if here is None:
            return values
        spread = values.new_zeros(here.numel()).masked_scatter(here, values)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(spread, group=self.pg_collection.cp)

    def hidden_states(self, row: PackedRow, context: RowContext) -> Tensor:
        """[T, 1, hidden] ([T / TP, 1, hidden] with sequence parallelism); after the final norm on the last stage.

        T counts the tokens that this context-parallel rank holds (`context.shard`).

        A row without images still runs the tower, on one merge block of zeros whose result is multiplied by zero, when the tower
        is trained: then no rank skips its gradient.
        """
        input_ids, position_ids, image_index = row.input_ids, row.position_ids, row.image_index
        visual_tokens, anchor = None, None
        deepstack: list[Tensor] = []
        if self.pre_process:
            if image_index.numel():
                visual_tokens, deepstack = self._see(row)
            elif torch.is_grad_enabled() and self._tower_is_trained:
                anchor = self._vision_anchor(row)
        if context.shard is not None:
            input_ids, position_ids = input_ids[context.shard.tokens], position_ids[:, context.shard.tokens]
            here, image_index = context.shard.locate(image_index)
            if visual_tokens is not None:
                visual_tokens, deepstack = visual_tokens[here], [feature[here] for feature in deepstack]
        hidden = self.language_model(
            input_ids,
            position_ids,
            context,
            image_index=image_index,
            visual_tokens=visual_tokens,
            deepstack=deepstack,
        )
        return hidden if anchor is None else hidden + anchor.to(hidden.dtype)

    @property
    def _tower_is_trained(self) -> bool:
        return next(self.vision_model.parameters()).requires_grad

    def _see(self, row: PackedRow) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens and deepstack features of the row's images; a frozen tower keeps no activations."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tower_is_trained):
            if self.pg_collection.cp.size() == 1:
                return self.vision_model(row.pixel_values, row.image_grid_thw)
            return self._see_together(row)

    def _see_together(self, row: PackedRow) -> tuple[Tensor, list[Tensor]]:
        """Context-parallel ranks have the same images: each sees whole ones, as many patches as the others, and all get all.

        Each rank's gradient is that of its own tokens; it comes back summed to the rank that saw the image.
        """
        group = self.pg_collection.cp
        patches = row.image_grid_thw.prod(dim=1).tolist()
        merged = [count // self.shape.vision.spatial_merge_size**2 for count in patches]
        shares = share_out(patches, group.size())
        longest = max(sum(merged[image] for image in share) for share in shares)
        own = self._see_some(row, patches, shares[group.rank()], longest)
        gathered = tensor_parallel.gather_from_sequence_parallel_region(
            own, group=group
        )  # [ranks * longest, 1 + features, hidden]
        starts = [0] * len(patches)
        for rank, share in enumerate(shares):
            cursor = rank * longest
            for image in share:
                starts[image] = cursor
                cursor += merged[image]
        places = [torch.arange(start, start + count) for start, count in zip(starts, merged, strict=True)]
        tokens, *features = gathered[torch.cat(places).to(gathered.device)].unbind(1)
        return tokens, features

    def _see_some(self, row: PackedRow, patches: list[int], images: list[int], length: int) -> Tensor:
        """Tokens and features, [length, 1 + features, hidden], of some of the row's images; zeros behind them.

        A rank without any still runs the tower when it is trained, as in a row without images.
        """
        if images:
            parts = row.pixel_values.split(patches)
            tokens, features = self.vision_model(torch.cat([parts[image] for image in images]), row.image_grid_thw[images])
            own = torch.stack([tokens, *features], dim=1)
            return torch.nn.functional.pad(own, (0, 0, 0, 0, 0, length - own.shape[0]))
        shape = (length, 1 + len(self.shape.vision.deepstack_layers), self.shape.hidden_size)
        nothing = torch.zeros(shape, dtype=self.config.params_dtype, device=row.input_ids.device)
        return nothing + self._vision_anchor(row).to(nothing.dtype) if torch.is_grad_enabled() else nothing

    def _vision_anchor(self, row: PackedRow) -> Tensor:
        """Zero, with a graph through every parameter of the tower."""
        merge = self.shape.vision.spatial_merge_size
        patches = torch.zeros(merge * merge, self.shape.vision.patch_width, device=row.input_ids.device)
        grid = torch.tensor([[1, merge, merge]], device=row.input_ids.device)
        tokens, features = self.vision_model(patches, grid)
        return torch.stack([tokens.sum(), *(feature.sum() for feature in features)]).sum() * 0.0


def _mark_cut_weights(model: torch.nn.Module) -> None:
    """Marks the weights that are cut over tensor-parallel ranks.

    Megatron marks a weight as it initialises it, which ours are not. Unmarked, it passes for a copy of the first rank's, and the
    gradient norm leaves out every other rank's part.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding) and module.weight is not None:
            cut = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=cut, stride=1)
