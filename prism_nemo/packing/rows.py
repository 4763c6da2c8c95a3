"""PackedRow: the one row format of every stage.

A row is a line of groups, each `[prefix | segment | segment ...]`. A token sees its own segment causally and its own group's
prefix, nothing else; every segment's positions start again right after the prefix. So a prompt and its images run through the
network once, whatever the number of responses, and each segment gets exactly what `prefix + segment` alone would give it.

Labels are a list of (source, target) pairs instead of a shifted copy of the row: the last prefix token predicts the first token
of every segment, so it has as many labels as there are segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from prism_nemo.errors import ConfigError
from prism_nemo.packing.groups import Group, Segment


@dataclass(frozen=True)
class GroupLayout:
    """Token counts of one group."""

    prefix: int
    segments: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prefix + sum(self.segments)


@dataclass(frozen=True)
class RowLayout:
    """Where the groups of a row lie; `padding` tokens at the end belong to none."""

    groups: tuple[GroupLayout, ...]
    padding: int = 0

    @cached_property
    def length(self) -> int:
        return sum(group.length for group in self.groups) + self.padding

    @cached_property
    def token_group(self) -> Tensor:
        """Group index of every token, int64 [length]; -1 for padding."""
        lengths = torch.tensor([group.length for group in self.groups] + [self.padding])
        index = torch.tensor([*range(len(self.groups)), -1])
        return index.repeat_interleave(lengths)

    @cached_property
    def token_segment(self) -> Tensor:
        """Segment index (running through the row) of every token, int64 [length]; -1 in prefixes and padding."""
        index: list[int] = []
        lengths: list[int] = []
        segments = 0
        for group in self.groups:
            index += [-1, *range(segments, segments + len(group.segments))]
            lengths += [group.prefix, *group.segments]
            segments += len(group.segments)
        return torch.tensor([*index, -1]).repeat_interleave(torch.tensor([*lengths, self.padding]))


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row of T tokens with S segments and N labels.

    input_ids       int64   [T]
    position_ids    int64   [3, T]
    image_index     int64   [V]          where the V merged visual tokens lie in the row
    pixel_values    float32 [patches, patch_size]
    image_grid_thw  int64   [images, 3]
    label_source    int64   [N]          the token whose output predicts the label
    label_ids       int64   [N]          the token to predict: every segment token, segments in order
    label_segment   int64   [N]          which segment of the row it belongs to
    segment_sample  int64   [S]          the caller's index of every segment
    segment_kind    int64   [S]          `SegmentKind`
    segment_end     int64   [S]          the segment's last token in the row
    """

    layout: RowLayout
    input_ids: Tensor
    position_ids: Tensor
    image_index: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    label_source: Tensor
    label_ids: Tensor
    label_segment: Tensor
    segment_sample: Tensor
    segment_kind: Tensor
    segment_end: Tensor
    sample_of_label: Tensor = field(init=False)  # int64 [N]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_of_label", self.segment_sample[self.label_segment])

    @property
    def num_tokens(self) -> int:
        """Tokens of the groups, without padding."""
        return self.layout.length - self.layout.padding

    @property
    def num_segments(self) -> int:
        return self.segment_sample.numel()

    @property
    def num_labels(self) -> int:
        return self.label_ids.numel()

    def to(self, device: torch.device) -> PackedRow:
        """The row with every tensor on the device."""
        if self.input_ids.device == device:
            return self
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.init and f.name != "layout"}
        return replace(self, **moved)


def make_row(groups: Sequence[Group], *, pad_multiple: int = 1, patch_size: int | None = None) -> PackedRow:
    """Packs groups into one row, padded at the end so that its length divides by `pad_multiple`.

    Without groups the row is `pad_multiple` padding tokens without labels, for a rank that has nothing to do but must take part;
    it then needs `patch_size`.
    """
    assert groups or patch_size is not None, "an empty row needs the patch size"
    ids, positions, image_index, layouts = [], [], [], []
    sources, labels, label_segments = [], [], []
    samples: list[int] = []
    kinds: list[int] = []
    ends: list[int] = []
    cursor = 0
    for group in groups:
        prompt = group.prompt
        last_prefix = cursor + len(prompt) - 1
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        image_index.append(prompt.image_mask.nonzero().flatten() + cursor)
        layouts.append(GroupLayout(len(prompt), tuple(len(segment) for segment in group.segments)))
        start = prompt.next_position
        cursor += len(prompt)
        for segment in group.segments:
            length = len(segment)
            assert length > 0, f"sample {segment.sample} has an empty segment"
            ids.append(segment.tokens)
            positions.append(torch.arange(start, start + length).expand(3, -1))
            sources.append(torch.cat([torch.tensor([last_prefix]), torch.arange(cursor, cursor + length - 1)]))
            labels.append(segment.tokens)
            label_segments.append(torch.full((length,), len(samples)))
            samples.append(segment.sample)
            kinds.append(int(segment.kind))
            cursor += length
            ends.append(cursor - 1)
    padding = -cursor % pad_multiple if groups else pad_multiple
    ids.append(torch.zeros(padding, dtype=torch.int64))
    positions.append(torch.arange(padding).expand(3, -1))
    nothing = torch.zeros(0, dtype=torch.int64)
    width = groups[0].prompt.pixel_values.shape[1] if groups else patch_size
    return PackedRow(
        layout=RowLayout(tuple(layouts), padding),
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        image_index=torch.cat([nothing, *image_index]),
        pixel_values=torch.cat([torch.zeros(0, width or 0), *(group.prompt.pixel_values for group in groups)]),
        image_grid_thw=torch.cat([nothing.view(0, 3), *(group.prompt.image_grid_thw for group in groups)]),
        label_source=torch.cat([nothing, *sources]),
        label_ids=torch.cat([nothing, *labels]),
        label_segment=torch.cat([nothing, *label_segments]),
        segment_sample=torch.tensor(samples, dtype=torch.int64),
        segment_kind=torch.tensor(kinds, dtype=torch.int64),
        segment_end=torch.tensor(ends, dtype=torch.int64),
    )


def split_to_budget(group: Group, max_tokens: int) -> list[Group]:
    """Cuts a group that exceeds the row budget into groups with the same prompt, in order.

    Raises ConfigError when even the prompt with one segment does not fit.
    """
    parts: list[Group] = []
    current: list[Segment] = []
    used = len(group.prompt)
    for segment in group.segments:
        if len(group.prompt) + len(segment) > max_tokens:
            raise ConfigError(
                f"a prompt of {len(group.prompt)} tokens with a segment of {len(segment)} does not fit a row of {max_tokens}",
                where="trainer.max_tokens_per_row",
                remedy="raise it to data.max_prompt_length + data.max_response_length",
            )
        if current and used + len(segment) > max_tokens:
            parts.append(replace(group, segments=tuple(current)))
            current, used = [], len(group.prompt)
        current.append(segment)
        used += len(segment)
    if len(group.prompt) > max_tokens:
        raise ConfigError(
            f"a prompt of {len(group.prompt)} tokens does not fit a row of {max_tokens}",
            where="trainer.max_tokens_per_row",
            remedy="raise it to data.max_prompt_length + data.max_response_length",
        )
    return [*parts, replace(group, segments=tuple(current))]


def pack_rows(groups: Sequence[Group], *, max_tokens: int, pad_multiple: int = 1) -> list[PackedRow]:
    """Packs groups into rows of at most `max_tokens` tokens (before padding), first-fit-decreasing; deterministic."""
    pieces = [piece for group in groups for piece in split_to_budget(group, max_tokens)]
    order = sorted(range(len(pieces)), key=lambda index: (-pieces[index].num_tokens, index))
    bins: list[tuple[int, list[int]]] = []
    for index in order:
        size = pieces[index].num_tokens
        slot = next((i for i, (used, _) in enumerate(bins) if used + size <= max_tokens), None)
        if slot is None:
            bins.append((size, [index]))
        else:
            bins[slot] = (bins[slot][0] + size, [*bins[slot][1], index])
    return [make_row([pieces[index] for index in sorted(members)], pad_multiple=pad_multiple) for _, members in bins]
