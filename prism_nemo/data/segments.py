"""The one way in which text becomes a discriminator's segments, whoever wrote it."""

from __future__ import annotations

from prism_nemo.config.enums import DiscriminatorView
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.errors import DataError
from prism_nemo.packing.groups import Segment, SegmentKind
from prism_nemo.rewards.format import parse_response

KINDS = {
    DiscriminatorView.segments: (SegmentKind.PERCEPTION, SegmentKind.REASONING),
    DiscriminatorView.whole: (SegmentKind.RESPONSE,),
}


def response_segments(text: str, encoder: ChatEncoder, view: DiscriminatorView, *, sample: int) -> tuple[Segment, ...]:
    """A response's segments, one of each of `KINDS[view]`, each closed by the end token at which it is scored.

    Raises DataError when the response's format is invalid or a segment is too long; nothing is ever cut.
    """
    parsed = parse_response(text)
    if parsed is None:
        raise DataError(
            "the response is not <caption>…</caption> <think>…</think> <answer>…</answer>",
            where=text[:200],
            remedy="each tag once, in this order, with nothing outside them and an answer",
        )
    if view is DiscriminatorView.whole:
        texts = [text.strip()]
    else:
        texts = [parsed.perception_segment, parsed.reasoning_segment]
    return tuple(Segment(encoder.encode_segment(part), sample, kind) for part, kind in zip(texts, KINDS[view], strict=True))
