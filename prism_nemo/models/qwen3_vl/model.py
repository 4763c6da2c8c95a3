"""Qwen3-VL on Megatron-Core: vision tower and language model over one packed row."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
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

from prism_nemo.config.schema import ParallelConfig, Precision
from prism_nemo.models.context import RowContext
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.language import Qwen3VLLanguageModel
from prism_nemo.models.qwen3_vl.vision import Qwen3VLVisionModel
from prism_nemo.packing.rows import PackedRow


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
    ) -> None:
        shape.check_layout(parallel)
        super().__init__(config=shape.language_config(parallel, precision))
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
        )
        _mark_cut_weights(self)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """What the previous pipeline stage sent (Megatron's schedules call this)."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """Megatron reduces its gradient over the first and last pipeline stage."""
        return self.language_model.shared_embedding_or_output_weight()

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        return self.language_model.share_embeddings_and_output_weights

    def hidden_states(self, row: PackedRow, context: RowContext) -> Tensor:
        """[T, 1, hidden] ([T / TP, 1, hidden] with sequence parallelism); after the final norm on the last stage.

        A row without images still runs the tower, on one merge block of zeros whose result is multiplied by zero, when the tower
        is trained: then no rank skips its gradient.
        """
        image_index = visual_tokens = None
        deepstack: list[Tensor] = []
        anchor = None
        if self.pre_process:
            if row.image_index.numel():
                image_index = row.image_index
                visual_tokens, deepstack = self.vision_model(row.pixel_values, row.image_grid_thw)
            elif torch.is_grad_enabled() and self._tower_is_trained:
                anchor = self._vision_anchor(row)
        hidden = self.language_model(
            row.input_ids,
            row.position_ids,
            context,
            image_index=image_index,
            visual_tokens=visual_tokens,
            deepstack=deepstack,
        )
        return hidden if anchor is None else hidden + anchor.to(hidden.dtype)

    @property
    def _tower_is_trained(self) -> bool:
        return next(self.vision_model.parameters()).requires_grad

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
