"""The planner's rows against the packer's, and its arithmetic on small numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prism_nemo.config.schema import ParallelConfig
from prism_nemo.errors import LayoutError
from prism_nemo.packing.groups import Group, Segment, text_prompt
from prism_nemo.packing.rows import pack_rows
from prism_nemo.plan.activations import Cost, Recompute, Row, Saved, saved_bytes
from prism_nemo.plan.decoding import Decoding
from prism_nemo.plan.hardware import ASSUMPTIONS, GIB, read_gpu
from prism_nemo.plan.memory import Overhead, model_state, stage_memory, training_pass
from prism_nemo.plan.placed import Placed, Settings
from prism_nemo.plan.shapes import Shape, read_shape
from prism_nemo.plan.timing import Cluster, step_time
from prism_nemo.plan.workload import Workload, discriminator_passes, policy_passes, prompts_per_rank

WORK = Workload("sft", 100, 50, 40, rollouts=1, global_batch=8, row_tokens=500, max_batch_size=64)
NO_OVERHEAD = Overhead(0.0, 0.0)


@pytest.mark.parametrize(("rollouts", "row_tokens"), [(1, 160), (1, 500), (6, 400), (6, 500), (6, 1000), (16, 350)])
def test_as_many_rows_and_tokens_as_the_packer_makes(rollouts: int, row_tokens: int) -> None:
    work = replace(WORK, rollouts=rollouts, row_tokens=row_tokens)
    prompt = text_prompt(torch.zeros(100, dtype=torch.int64), 8)
    groups = [Group(prompt, tuple(Segment(torch.zeros(50, dtype=torch.int64), i) for i in range(rollouts))) for _ in range(3)]
    rows = pack_rows(groups, max_tokens=row_tokens)
    passes = policy_passes(work, 3)
    assert passes.row.tokens <= row_tokens
    assert max(row.num_tokens for row in rows) <= passes.row.tokens
    # a last piece with fewer responses is planned as a full one, and packed with others where there is room
    assert len(rows) <= passes.num_rows <= len(rows) + 1
    assert passes.tokens == pytest.approx(sum(row.num_tokens for row in rows), rel=0.35)
    if rollouts % passes.segments == 0:
        assert (passes.num_rows, passes.tokens) == (len(rows), sum(row.num_tokens for row in rows))


def test_the_discriminators_teacher_stands_in_every_piece() -> None:
    """Rows of 300 hold 100 + 50 of the teacher and 3 students: 6 rollouts make 2 pieces a prompt."""
    passes = discriminator_passes(replace(WORK, stage="align", rollouts=6, row_tokens=300), 2)
    assert (passes.num_groups, passes.segments, passes.tokens) == (4, 4, 4 * 300)
    assert (passes.num_rows, passes.row.tokens, passes.row.visual_tokens, passes.labels) == (4, 300, 40, 4 * 4 * 50)


def test_a_batch_that_does_not_divide_is_refused_as_a_stage_refuses_it() -> None:
    assert prompts_per_rank(WORK, ParallelConfig(tensor_model_parallel_size=2), 8) == 2
    with pytest.raises(LayoutError, match="a global batch of 8 does not divide over 3 data-parallel ranks"):
        prompts_per_rank(WORK, ParallelConfig(), 3)


# Memory


def shape() -> Shape:
    return read_shape("2B")


def test_state_of_a_model_in_bf16_and_fp32() -> None:
    parameters = 2_127_532_032
    alone = model_state(shape(), ParallelConfig(), 4, Settings())
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    spread = model_state(shape(), ParallelConfig(use_distributed_optimizer=True), 4, Settings())
    assert (spread.weights, spread.gradients, spread.optimizer) == (2 * parameters, 4 * parameters, 3 * parameters)
    fp32 = model_state(shape(), ParallelConfig(), 1, Settings(Cost(value_bytes=4)))
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    frozen = model_state(shape(), ParallelConfig(), 1, Settings(Cost(vision_is_trained=False)))
    assert frozen.gradients == 4 * (parameters - 406_957_056)
    away = model_state(shape(), ParallelConfig(), 1, Settings(cpu_offload=True))
    assert (away.optimizer, away.optimizer_step) == (0, alone.optimizer + alone.optimizer_step)  # on the GPU while it steps


def test_experts_are_spread_over_their_own_replicas() -> None:
    """EP 4 of 8 ranks leaves 2 copies of every expert; the rest has 8 copies."""
    moe = read_shape("30B-A3B")
    layout = ParallelConfig(expert_model_parallel_size=4, use_distributed_optimizer=True)
    dense, experts = 31_070_754_032 - 28_991_029_248, 28_991_029_248
    assert model_state(moe, layout, 8, Settings()).optimizer == 12 * (dense / 8 + experts / 4 / 2)


def test_what_recompute_keeps() -> None:
    """Of a layer in bf16: its input; what its MLP starts from; everything but attention's statistics, one number a head."""
    row = Row(tokens=4096, visual_tokens=1024, labels=0)

    def saved(recompute: Recompute) -> Saved:
        return saved_bytes(shape(), row, ParallelConfig(), Cost(recompute=recompute))

    none, core, mlp, both, full = (saved(Recompute(name)) for name in ("none", "core_attn", "mlp", "core_attn+mlp", "full"))
    norm_and_mlp = 4096 * (8 * 2048 + 4 + 2 * 5 * 6144)
    assert full.per_layer == 2 * 4096 * 2048
    assert full.again == none.per_layer and none.again == 0
    assert none.per_layer - core.per_layer == 4096 * 4 * 16
    assert none.per_layer - mlp.per_layer == norm_and_mlp - 2 * 4096 * 2048
    assert mlp.again == norm_and_mlp
    assert none.per_layer - both.per_layer == (none.per_layer - core.per_layer) + (none.per_layer - mlp.per_layer)
    assert none.vision > mlp.vision > full.vision > 24 * 4096 * 2 * 1024
    assert (none.head, none.entry) == (full.head, full.entry)


def test_context_parallel_ranks_share_whole_images() -> None:
    """Of three images one of two ranks sees two; one image is seen by one rank."""
    layout = ParallelConfig(context_parallel_size=2)
    whole = saved_bytes(shape(), Row(4096, 1536, 0, images=3), ParallelConfig(), Cost()).vision
    assert saved_bytes(shape(), Row(4096, 1536, 0, images=3), layout, Cost()).vision == pytest.approx(whole * 2 / 3)
    assert saved_bytes(shape(), Row(4096, 1536, 0, images=1), layout, Cost()).vision == whole
    assert policy_passes(replace(WORK, row_tokens=500), 8).row.images == 4  # rows of 500 hold three prompts of 150 and a part


def test_a_pipelines_first_stage_keeps_most_rows() -> None:
    row, layout = Row(4096, 0, 4096), ParallelConfig(pipeline_model_parallel_size=4)
    per_layer = saved_bytes(shape(), row, layout, Cost()).per_layer

    def kept(stage: int, rows: int, layout: ParallelConfig = layout) -> float:
        return training_pass(shape(), row, rows, layout, Settings(), stage).activations

    assert kept(0, 8) - kept(1, 8) == pytest.approx(7 * per_layer, rel=0.05)
    assert kept(0, 8) - kept(0, 2) == pytest.approx(2 * 7 * per_layer, rel=0.05)
    assert kept(0, 8) == kept(0, 4)


def test_as_many_sequences_are_decoded_together_as_fit() -> None:
    work = Workload("rlvr", 2048, 8192, 1024, rollouts=16, global_batch=32, row_tokens=10240, max_batch_size=256)

    def planned(capacity: float | None) -> Decoding:
        policy = Placed(shape(), ParallelConfig(use_distributed_optimizer=True))
        memory = stage_memory(policy, None, work, 8, NO_OVERHEAD, capacity=capacity)
        assert memory.decoding is not None
        return memory.decoding

    assert planned(None).sequences == 64  # 4 prompts of 16 on every rank
    assert planned(140 * GIB).sequences == 64
    tight = planned(60 * GIB)
    assert 1 <= tight.sequences < 64
    assert tight.total <= 60 * GIB < planned(None).total + 60 * GIB


def test_the_fullest_rank_counts() -> None:
    """Stage 0 has the tower and most rows, the last one the logits."""
    work = Workload("sft", 2048, 2048, 1024, rollouts=1, global_batch=64, row_tokens=4096, max_batch_size=1)
    policy = Placed(read_shape("8B"), ParallelConfig(pipeline_model_parallel_size=4))
    memory = stage_memory(policy, None, work, 4, NO_OVERHEAD)
    assert memory.stage == 0 and memory.policy_pass.vision > 0 and memory.policy_pass.logits == 0


GAME = Workload("align", 2048, 2048, 1024, rollouts=4, global_batch=8, row_tokens=8192, max_batch_size=8)


def placed(size: str, *, discriminator: bool = False, **sizes: int) -> Placed:
    model = read_shape(size)
    return Placed(model.as_discriminator(4) if discriminator else model, ParallelConfig(**sizes))


def test_two_models_cut_differently_add_up_on_every_rank() -> None:
    """The policy over 8 tensor-parallel ranks, a discriminator of one rank, and each of them alone in the stage of its own."""
    policy = placed("8B", tensor_model_parallel_size=8)
    discriminator = placed("2B", discriminator=True, expert_model_parallel_size=4)
    both = stage_memory(policy, discriminator, GAME, 8, NO_OVERHEAD)
    of_policy = stage_memory(policy, None, GAME, 8, NO_OVERHEAD)
    of_discriminator = stage_memory(None, discriminator, GAME, 8, NO_OVERHEAD)
    assert both.state == of_policy.state + of_discriminator.state
    phases = {**of_policy.phases, **of_discriminator.phases}
    optimizer = max(memory.phases["optimizer step"] for memory in (of_policy, of_discriminator))
    assert both.phases == {**phases, "optimizer step": optimizer}
    assert both.decoding == of_policy.decoding


def test_ranks_are_in_other_stages_of_the_other_model() -> None:
    """Four stages beside two: ranks 0 and 1 of four share the discriminator's first, with its tower. The worst one counts."""
    policy = placed("8B", pipeline_model_parallel_size=4)
    discriminator = placed("2B", discriminator=True, pipeline_model_parallel_size=2)
    memory = stage_memory(policy, discriminator, GAME, 4, NO_OVERHEAD)
    totals = {}
    for rank in range(4):
        states = [
            model_state(model.shape, model.parallel, 4, model.settings, stage)
            for model, stage in ((policy, rank), (discriminator, rank // 2))
        ]
        totals[rank] = sum(state.total for state in states)
    assert (memory.stage, memory.state) == (0, totals[0])
    only = stage_memory(discriminator, policy, GAME, 4, NO_OVERHEAD)  # the other way round the same ranks meet
    assert only.state == totals[0] and only.stage == 0


def test_comparisons_are_dealt_out_over_a_discriminators_own_copies() -> None:
    """8 prompts: one for each of 8 copies, 4 for each of 2; and one for half of 16."""
    for sizes, world, prompts in (({}, 8, 1), ({"tensor_model_parallel_size": 4}, 8, 4), ({}, 16, 1)):
        packed = placed("2B", discriminator=True, **sizes).passes(GAME, world)
        assert packed == discriminator_passes(GAME, prompts)


# Time


def seconds(size: str, work: Workload, layout: ParallelConfig, settings: Settings, nodes: int = 1) -> dict[str, float]:
    cluster = Cluster(read_gpu("h100"), nodes, 8)
    policy = Placed(read_shape(size), layout, settings)
    memory = stage_memory(policy, None, work, cluster.world_size, NO_OVERHEAD)
    return step_time(policy, None, work, cluster, memory).phases


def test_a_dense_step_takes_six_operations_a_parameter_and_token_at_least() -> None:
    """The share of the peak that is left is below the one that is assumed of matrix products, and not by far."""
    work = Workload("sft", 128, 3968, 0, rollouts=1, global_batch=256, row_tokens=4096, max_batch_size=1)
    layout = ParallelConfig(use_distributed_optimizer=True)
    ideal = 6 * 8.2e9 * 256 * 4096 / 8 / 989e12
    found = seconds("8B", work, layout, Settings())["policy"]
    assert ASSUMPTIONS.matmul_share / 3 < ideal / found < ASSUMPTIONS.matmul_share


def test_full_recompute_costs_a_forward_pass() -> None:
    work = Workload("sft", 128, 3968, 0, rollouts=1, global_batch=256, row_tokens=4096, max_batch_size=1)
    layout = ParallelConfig(use_distributed_optimizer=True)
    none = seconds("8B", work, layout, Settings())["policy"]
    full = seconds("8B", work, layout, Settings(Cost(recompute=Recompute.full)))["policy"]
    assert 1.2 < full / none < 1.34


def test_decoding_reads_all_weights_for_every_token_of_a_response() -> None:
    """One sequence a rank, a long response: at least weights / bandwidth a token, or the time to launch its kernels."""
    work = Workload("rlvr", 128, 4096, 0, rollouts=1, global_batch=8, row_tokens=8192, max_batch_size=1)
    found = seconds("8B", work, ParallelConfig(use_distributed_optimizer=True), Settings())["rollout"]
    per_token = 2 * 8.2e9 / (3.35e12 * ASSUMPTIONS.memory_share)
    assert 4096 * per_token < found < 3 * 4096 * per_token


def test_gradients_travel_over_the_network_between_machines() -> None:
    work = Workload("sft", 128, 896, 0, rollouts=1, global_batch=16, row_tokens=1024, max_batch_size=1)
    layout = ParallelConfig(use_distributed_optimizer=True)
    one, two = (seconds("8B", replace(work, global_batch=8 * n), layout, Settings(), n)["policy"] for n in (1, 2))
    network = 6 * 8.77e9 * 15 / 16 / (50e9 * ASSUMPTIONS.network_share)
    assert one < network < two


def test_a_discriminators_own_layout_takes_its_own_time() -> None:
    """Rollouts and the policy's update are as without it; its own is as where it is cut so and alone."""
    cluster = Cluster(read_gpu("h200"), 1, 8)
    policy = placed("8B", tensor_model_parallel_size=4)
    discriminator = placed("2B", discriminator=True)
    found = {}
    for name, models in (("both", (policy, discriminator)), ("policy", (policy, None)), ("discriminator", (None, discriminator))):
        found[name] = step_time(*models, GAME, cluster, stage_memory(*models, GAME, 8, NO_OVERHEAD))
    assert found["both"].phases == {**found["policy"].phases, **found["discriminator"].phases}
    assert found["both"].communication == pytest.approx(found["policy"].communication + found["discriminator"].communication)
    assert found["both"].tokens == found["policy"].tokens
