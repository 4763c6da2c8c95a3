"""The discriminator's batch: rows, pairs, loss and metrics against loops over plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.rows import one_rank
from helpers.tiny import make_prompt, random_tokens
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, finalize, merge
from prism_nemo.config.enums import DiscriminatorView
from prism_nemo.config.schema import DiscriminatorConfig
from prism_nemo.errors import ConfigError
from prism_nemo.packing.groups import Segment, SegmentKind
from prism_nemo.packing.rows import PackedRow
from prism_nemo.stages.comparisons import TEACHER, Comparison, ComparisonBatch

PERCEPTION, REASONING = KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
LAMBDA = 0.3
CONFIG = DiscriminatorConfig(score_regularization=LAMBDA)
STUDENTS = ((0, 1, 2, 3, 4, 7), (5, 8), (), (9,))  # of each prompt; response 6 is in no comparison
NUM_STUDENTS = 10
ROOM = 10_000  # tokens


def segments(sample: int, length: int) -> tuple[Segment, ...]:
    return tuple(
        Segment(random_tokens(length + 2 * column, seed=100 * (sample + 5) + column), sample, kind)
        for column, kind in enumerate(KINDS)
    )


def make_comparisons(students: Sequence[Sequence[int]] = STUDENTS) -> list[Comparison]:
    return [
        Comparison(
            make_prompt([(4, 4)] if number == 1 else (), seed=number, text_length=6),
            segments(TEACHER, 4 + number),
            tuple(segments(index, 3 + index) for index in own),
        )
        for number, own in enumerate(students)
    ]


def make_batch(
    max_tokens: int = ROOM, comparisons: Sequence[Comparison] | None = None, config: DiscriminatorConfig = CONFIG
) -> ComparisonBatch:
    return ComparisonBatch(
        make_comparisons() if comparisons is None else comparisons, NUM_STUDENTS, config, one_rank(), max_tokens=max_tokens
    )


def draw_scores(seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 [comparisons, 2] of the teachers and [responses, 2] of the students, leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(len(STUDENTS), 2, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    student = torch.randn(NUM_STUDENTS, 2, dtype=torch.float64, generator=generator).mul_(2).requires_grad_()
    return teacher, student


def row_scores(row: PackedRow, teacher: Tensor, student: Tensor) -> Tensor:
    """What a network with these opinions says of a row."""
    values = []
    for kind, sample in zip(row.segment_kind.tolist(), row.segment_sample.tolist(), strict=True):
        column = KINDS.index(SegmentKind(kind))
        values.append(teacher[-1 - sample, column] if sample < 0 else student[sample, column])
    return torch.stack(values)


def total(batch: ComparisonBatch, teacher: Tensor, student: Tensor) -> tuple[Tensor, dict[str, float]]:
    loss = torch.zeros((), dtype=torch.float64)
    sums: MetricSums = {}
    for row in batch.rows:
        part, metrics = batch.loss(row, row_scores(row, teacher, student))
        loss, sums = loss + part, merge(sums, metrics)
    return loss, finalize(sums)


def by_hand(teacher: Tensor, student: Tensor, coefficient: float, students: Sequence[Sequence[int]] = STUDENTS) -> Tensor:
    """The formula of the algorithm, pair by pair."""
    pairs = [(number, index) for number, own in enumerate(students) for index in own]
    bradley_terry = sum(
        -torch.log(torch.sigmoid(teacher[number, column] - student[index, column]))
        for number, index in pairs
        for column in (0, 1)
    )
    means = []
    for column in (0, 1):
        means.append(sum(teacher[number, column] ** 2 for number in range(len(students))) / len(students))
        means.append(sum(student[index, column] ** 2 for _, index in pairs) / len(pairs))
    return bradley_terry / len(pairs) + coefficient * sum(means) / 4


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("coefficient", [0.0, LAMBDA])
@pytest.mark.parametrize("max_tokens", [ROOM, 120, 56])
def test_loss_and_gradient_are_the_formulas(max_tokens: int, coefficient: float) -> None:
    """In one row, in several, and with the first comparison cut over rows, its teacher in each."""
    teacher, student = draw_scores()
    batch = make_batch(max_tokens, config=replace(CONFIG, score_regularization=coefficient))
    loss, _ = total(batch, teacher, student)
    expected = by_hand(teacher, student, coefficient)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # numbers of copies are float32
    for found, want in zip(grads(loss, teacher, student), grads(expected, teacher, student), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-12)


def test_the_rows_are_cut_as_the_test_above_thinks() -> None:
    assert len(make_batch(ROOM).rows) == 1
    assert make_batch(ROOM).copies.tolist() == [1, 1, 1, 1]
    assert len(make_batch(120).rows) == 3
    cut = make_batch(56)
    assert cut.copies.tolist() == [3, 2, 1, 1]
    assert all(row.num_tokens <= 56 for row in cut.rows)
    teachers = [sample for row in cut.rows for sample in row.segment_sample.tolist() if sample < 0]
    assert {sample: teachers.count(sample) for sample in set(teachers)} == {-1: 6, -2: 4, -3: 2, -4: 2}
    students = sorted(sample for row in cut.rows for sample in row.segment_sample.tolist() if sample >= 0)
    assert students == sorted([index for own in STUDENTS for index in own] * 2)


@pytest.mark.parametrize("max_tokens", [ROOM, 56])
def test_scores_are_kept_by_response_and_kind(max_tokens: int) -> None:
    teacher, student = draw_scores()
    batch = make_batch(max_tokens)
    assert bool(batch.student_scores.isnan().all())
    total(batch, teacher, student)
    inside = torch.tensor([index != 6 for index in range(NUM_STUDENTS)])
    assert torch.equal(batch.compared, inside)
    assert torch.equal(batch.comparison_of, torch.tensor([0, 0, 0, 0, 0, 1, -1, 0, 1, 3]))
    torch.testing.assert_close(batch.student_scores[inside], student.detach().float()[inside])
    assert bool(batch.student_scores[~inside].isnan().all())
    torch.testing.assert_close(batch.teacher_scores, teacher.detach().float())  # that of the prompt without students too
    assert not batch.student_scores.requires_grad


@pytest.mark.parametrize("max_tokens", [ROOM, 120, 56])
def test_metrics_by_hand(max_tokens: int) -> None:
    """A tie, and a group whose students all tie; the cut changes nothing, not even where it goes through a group."""
    teacher, student = draw_scores()
    with torch.no_grad():
        student[8] = student[5]  # the group of prompt 1 has no spread
        student[9, 0] = teacher[3, 0]  # a tie
        student[9, 1] = teacher[3, 1] + 5e-6  # also one
    batch = make_batch(max_tokens)
    _, metrics = total(batch, teacher, student)
    pairs = [(number, index) for number, own in enumerate(STUDENTS) for index in own]
    for column, name in enumerate(("perception", "reasoning")):
        margins = [float(teacher[number, column] - student[index, column]) for number, index in pairs]
        untied = [margin for margin in margins if abs(margin) > 1e-5]
        assert len(untied) == len(margins) - 1
        assert metrics[f"{name}/accuracy"] == pytest.approx(sum(margin > 0 for margin in untied) / len(untied))
        assert metrics[f"{name}/ties"] == pytest.approx(1 / len(pairs))
        assert metrics[f"{name}/margin"] == pytest.approx(sum(margins) / len(pairs))
        assert metrics[f"{name}/teacher_score"] == pytest.approx(
            sum(float(teacher[number, column]) for number, _ in pairs) / len(pairs)
        )
        assert metrics[f"{name}/student_score"] == pytest.approx(
            sum(float(student[index, column]) for _, index in pairs) / len(pairs)
        )
    assert finalize(batch.spread()) == {"perception/groups_without_spread": 1 / 2, "reasoning/groups_without_spread": 1 / 2}


def test_the_order_of_the_students_does_not_matter() -> None:
    """Reversed, and cut over rows in other places."""
    teacher, student = draw_scores()
    expected, expected_metrics = total(make_batch(), teacher, student)
    reverse = [replace(item, students=item.students[::-1]) for item in make_comparisons()]
    found, metrics = total(make_batch(56, reverse), teacher, student)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert metrics == pytest.approx(expected_metrics)


def test_the_order_of_the_prompts_does_not_matter() -> None:
    teacher, student = draw_scores()
    expected, _ = total(make_batch(), teacher, student)
    found, _ = total(make_batch(comparisons=make_comparisons()[::-1]), teacher.flip(0), student)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_no_student_at_all() -> None:
    """Every rollout is invalid: no pair, no accuracy; the regularisation of the teachers stays, and so does the graph."""
    teacher, student = draw_scores()
    batch = make_batch(comparisons=make_comparisons([(), ()]))
    loss, metrics = total(batch, teacher, student)
    expected = LAMBDA * teacher[:2].square().mean(dim=0).sum() / 4
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert metrics == {}
    assert not batch.compared.any()
    assert float(grads(loss, teacher)[0].norm()) > 0
    off = make_batch(comparisons=make_comparisons([(), ()]), config=DiscriminatorConfig())
    zero, _ = total(off, teacher, student)
    assert float(zero) == 0.0
    assert torch.equal(grads(zero, teacher)[0], torch.zeros_like(teacher))


def test_no_comparison_at_all() -> None:
    """A data-parallel rank without prompts."""
    batch = make_batch(comparisons=[])
    assert batch.rows == []
    assert not batch.compared.any()


def test_one_score_for_the_whole_response() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher, student = (
        torch.randn(1, generator=generator, dtype=torch.float64),
        torch.randn(3, generator=generator, dtype=torch.float64),
    )
    comparison = Comparison(
        make_prompt((), seed=0),
        (Segment(random_tokens(5, 1), TEACHER),),
        tuple((Segment(random_tokens(4 + index, 2 + index), index),) for index in range(3)),
    )
    config = DiscriminatorConfig(view=DiscriminatorView.whole, score_regularization=LAMBDA)
    batch = ComparisonBatch([comparison], 3, config, one_rank(), max_tokens=ROOM)
    loss, metrics = batch.loss(batch.rows[0], torch.cat([teacher, student]))
    expected = sum(math.log1p(math.exp(float(value - teacher))) for value in student) / 3
    expected += LAMBDA * (float(teacher[0]) ** 2 + float(student.square().mean())) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(batch.student_scores, student.float().unsqueeze(1))
    assert finalize(metrics)["response/accuracy"] == pytest.approx(float((teacher > student).double().mean()))


@pytest.mark.parametrize("max_tokens", [ROOM, 56])
def test_probe_counts_a_tie_as_half(max_tokens: int) -> None:
    teacher, student = draw_scores()
    with torch.no_grad():
        student[0] = teacher[0]
    batch = make_batch(max_tokens)
    sums: MetricSums = {}
    for row in batch.rows:
        loss, metrics = batch.probe(row, row_scores(row, teacher, student))
        assert float(loss) == 0.0
        sums = merge(sums, metrics)
    found = finalize(sums)
    pairs = [(number, index) for number, own in enumerate(STUDENTS) for index in own]
    for column, name in enumerate(("perception", "reasoning")):
        margins = [float(teacher[number, column] - student[index, column]) for number, index in pairs]
        wins = sum(0.5 if margin == 0 else float(margin > 0) for margin in margins)
        assert found[f"{name}/content_probe"] == pytest.approx(wins / len(pairs))
        assert found[f"{name}/content_probe_margin"] == pytest.approx(sum(margins) / len(pairs))
    assert bool(batch.student_scores.isnan().all())


def test_a_row_too_small_for_one_pair_names_the_key_and_the_size() -> None:
    comparison = make_comparisons([(0,)])
    with pytest.raises(ConfigError, match="has 24 tokens, a row holds 23") as caught:
        make_batch(23, comparison)
    assert caught.value.where == "trainer.max_tokens_per_row"
    assert len(make_batch(24, comparison).rows) == 1


def test_numbering_students() -> None:
    numbered = make_comparisons([(0, 1)])[0].numbered(7)
    assert [segment.sample for student in numbered.students for segment in student] == [7, 7, 8, 8]
    assert [segment.sample for segment in numbered.teacher] == [TEACHER, TEACHER]
    assert [segment.kind for segment in numbered.students[0]] == list(KINDS)
