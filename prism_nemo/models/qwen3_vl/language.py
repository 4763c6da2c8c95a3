"""The language model: embedding, layers with deepstack features added between them, final norm, output weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prism_nemo.models.context import RowContext
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.fp8 import LOCAL, LayerKind, fp8_contexts
from prism_nemo.models.qwen3_vl.rope import mrope_cos_sin
from prism_nemo.models.qwen3_vl.spec import RMSNorm, language_layer_spec
from prism_nemo.models.qwen3_vl.te_spec import te_language_layer_spec


class LanguageBlock(TransformerBlock):
    """Language layers. After global layer i, deepstack feature i is added to the visual tokens.

    A pipeline stage whose layers end before the features do sends the rest on behind the hidden states, as more rows of the same
    tensor; the next stage knows from the row how many there are.
    """

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: RowContext,
        image_index: Tensor | None,
        deepstack: Sequence[Tensor],
    ) -> Tensor:
        """[T, 1, hidden] -> the same; `image_index` int64 [V'] are rows of `hidden`, each feature [V', hidden].

        On later pipeline stages hidden states and the features that are still to be added are what the stage before sent.
        """
        first = self.layers[0].layer_number - 1
        waiting = dict(enumerate(deepstack))
        if not self.pre_process:
            hidden, waiting = self._received(image_index, first)
        around_all, around_each = fp8_contexts(self.config, context.fp8)
        with around_all:
            for depth, layer in enumerate(self.layers, start=first):
                with around_each(depth):
                    hidden = layer.run(hidden, rotary, context)
                if depth in waiting:
                    assert image_index is not None
                    hidden = hidden.index_add(0, image_index, waiting.pop(depth).unsqueeze(1).to(hidden.dtype))
        if waiting and not self.post_process:
            hidden = torch.cat([hidden, *(feature.unsqueeze(1).to(hidden.dtype) for feature in waiting.values())])
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)

    def _received(self, image_index: Tensor | None, first: int) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states and deepstack features, by the layer they belong to."""
        visual = 0 if image_index is None else image_index.numel()
        remaining = range(first, self.num_deepstack) if visual else range(0)
        parts = self.input_tensor.split([self.input_tensor.shape[0] - visual * len(remaining), *[visual] * len(remaining)])
        return parts[0], {depth: part.squeeze(1) for depth, part in zip(remaining, parts[1:], strict=True)}


class Qwen3VLLanguageModel(LanguageModule):
    """`pre_process`: holds the embedding; `post_process`: holds the final norm and, with `output_head`, the output weight."""

    def __init__(
        self,
        shape: Qwen3VLShape,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        pre_process: bool,
        post_process: bool,
        output_head: bool = True,
        vp_stage: int | None = None,
        kind: LayerKind = LOCAL,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.shape = shape
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.output_head = output_head
        self.share_embeddings_and_output_weights = shape.tie_word_embeddings and output_head
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=shape.vocab_size,
                max_sequence_length=0,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,  # visual tokens are put in first
                tp_group=pg_collection.tp,
            )
        spec = (te_language_layer_spec if kind.transformer_engine else language_layer_spec)(moe=shape.moe is not None)
        layers = [spec] * get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
        self.decoder = LanguageBlock(
            config,
            TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.decoder.num_deepstack = len(shape.vision.deepstack_layers)
        if post_process and output_head:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                shape.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and self.share_embeddings_and_output_weights,
                tp_group=pg_collection.tp,
            )
        if output_head and (pre_process or post_process):
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    @property
    def output_weight(self) -> Tensor:
        """[vocabulary / TP, hidden]."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context: RowContext,
        *,
        image_index: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        deepstack: Sequence[Tensor] = (),
    ) -> Tensor:
        """Hidden states [T, 1, hidden] (with sequence parallelism [T / TP, 1, hidden]), after the final norm on the last stage.

        T tokens are here: input_ids int64 [T], position_ids int64 [3, T], and at `image_index` int64 [V] the visual ones, whose
        embeddings visual tokens [V, hidden] replace on the first stage.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding.word_embeddings(input_ids.unsqueeze(1))  # [T, 1, hidden]
            if visual_tokens is not None:
                assert image_index is not None
                hidden = hidden.index_copy(0, image_index, visual_tokens.unsqueeze(1).to(hidden.dtype))
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        if self.config.sequence_parallel and image_index is not None:
            image_index, deepstack = self._local_features(image_index, deepstack, input_ids.numel())
        cos, sin = mrope_cos_sin(
            position_ids, head_dim=self.shape.head_dim, theta=self.shape.rope_theta, section=self.shape.mrope_section
        )
        rotary = (cos.to(self.config.params_dtype), sin.to(self.config.params_dtype))
        return self.decoder(hidden, rotary, context, image_index, deepstack)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Without an output weight there is nothing to tie: Megatron's general form does."""
        if self.output_head:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)

    def _local_features(self, image_index: Tensor, deepstack: Sequence[Tensor], length: int) -> tuple[Tensor, list[Tensor]]:
        """The visual tokens that lie in this rank's slice of the row; gradients of the features are summed over the slices."""
        group = self.pg_collection.tp
        size = length // group.size()
        local = image_index - group.rank() * size
        mine = ((local >= 0) & (local < size)).nonzero().flatten()
        features = [tensor_parallel.copy_to_tensor_model_parallel_region(feature, group=group)[mine] for feature in deepstack]
        return local[mine], features


def gather_rows(hidden: Tensor, index: Tensor, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """Hidden states [N, hidden] of the tokens at `index`, from [T or T / TP, 1, hidden].

    Every rank gets all of them; what follows must be the same on every rank, or sum its gradient over the ranks itself.
    """
    if config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=tp_group)
    return hidden.squeeze(1).index_select(0, index)
