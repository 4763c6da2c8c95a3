"""The content probe: does the discriminator prefer the teacher's text to the same text with one fact changed?

Pair accuracy does not tell: a discriminator that has learned style alone wins its pairs too, and alignment with it destroys
perception. Each segment is probed by itself.
"""

from __future__ import annotations

from prism_nemo.config.schema import AlignConfig, WarmupConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.records import Record
from prism_nemo.data.segments import response_segments
from prism_nemo.engine.runtime import Runtime
from prism_nemo.evaluation.held_out import open_held_out
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.packing.groups import without_images
from prism_nemo.stages.comparisons import TEACHER, Comparison, ComparisonBatch


class ContentProbe:
    """Probes on the validation records that have an altered response (`probe_response`); without any it measures nothing.

    Raises DataError for records that cannot be used (see `open_held_out`).
    """

    def __init__(
        self, discriminator: DiscriminatorModel, encoder: ChatEncoder, config: WarmupConfig | AlignConfig, runtime: Runtime
    ) -> None:
        self.discriminator = discriminator
        self.encoder = encoder
        self.config = config
        self.runtime = runtime
        self.held_out = open_held_out(
            config.data,
            self._encode,
            runtime,
            limit=config.trainer.limit_val_samples,
            wanted=lambda record: record.probe_response is not None and record.response is not None,
        )

    def run(self) -> dict[str, float]:
        """`perception/content_probe` and `reasoning/content_probe`, and their margins. A collective."""
        if not self.held_out.total:
            return {}
        comparisons = [self._encode(record, index) for index, record in enumerate(self.held_out.mine)]
        batch = ComparisonBatch(
            comparisons,
            len(comparisons),
            self.config.discriminator,
            self.runtime,
            max_tokens=self.config.trainer.max_tokens_per_row,
        )
        with self.discriminator.inference_mode():
            _, metrics = self.discriminator.get_loss_and_metrics(batch.probe_batch, forward_only=True)
        return metrics

    def _encode(self, record: Record, index: int = 0) -> Comparison:
        assert record.response is not None and record.probe_response is not None
        prompt = self.encoder.encode_prompt(record)
        view = self.config.discriminator.view
        return Comparison(
            prompt if self.config.discriminator.use_images else without_images(prompt),
            teacher=response_segments(record.response, self.encoder, view, sample=TEACHER),
            students=(response_segments(record.probe_response, self.encoder, view, sample=index),),
        )
