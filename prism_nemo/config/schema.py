"""Every configuration key, its type, its meaning and its one default.

The YAML files in `conf/` compose over these dataclasses; an unknown key or a wrong type fails before anything heavy is
imported. Names follow Megatron and NeMo where they have one. Units stand in names, meanings in the comment behind a field;
`prism-nemo STAGE --help` prints those comments, so each field has one, on its own line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from prism_nemo.config.digits import DigitsConfig
from prism_nemo.config.endpoint import CurationConfig, EndpointConfig, JudgeConfig
from prism_nemo.config.enums import (
    Aggregation,
    AlignReward,
    Benchmark,
    DecayStyle,
    Device,
    DiscriminatorView,
    Fp8Recipe,
    KLEstimator,
    Precision,
    RatioKind,
    RecomputeGranularity,
    RecomputeModule,
    RolloutCorrection,
    RolloutEngineKind,
    Routing,
    StageKind,
    TransformerImpl,
)
from prism_nemo.config.rollout import GenerateSettings, RolloutConfig, ServeSettings


@dataclass
class ParallelConfig:
    """How the models are cut over the ranks, in Megatron's words; what is left over is data-parallel."""

    tensor_model_parallel_size: int = 1  # ranks that share every layer; must divide the attention and the key/value heads
    pipeline_model_parallel_size: int = 1  # ranks that share the stack of layers
    virtual_pipeline_model_parallel_size: int | None = None  # layer chunks a pipeline rank, interleaved; null: one
    num_layers_in_first_pipeline_stage: int | None = None  # null: as many as in the others
    num_layers_in_last_pipeline_stage: int | None = None  # null: as many as in the others
    context_parallel_size: int = 1  # ranks that share every row's tokens
    expert_model_parallel_size: int = 1  # ranks that share the experts of an MoE layer
    expert_tensor_parallel_size: int | None = None  # null: the tensor-parallel size when experts are not distributed, otherwise 1
    sequence_parallel: bool = False  # norms and dropout on 1/TP of the tokens; needs tensor parallelism
    use_distributed_optimizer: bool = False  # optimizer state spread over the data-parallel ranks
    recompute_granularity: RecomputeGranularity | None = None  # what backward computes again instead of keeping; null: nothing
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: [RecomputeModule.core_attn])  # when selective


@dataclass
class DiscriminatorParallelConfig(ParallelConfig):
    """The discriminator's own layout, over the same ranks as the policy's."""

    as_policy: bool = True  # cut as the policy is; false: as the other keys of this section say


@dataclass
class RuntimeConfig:
    """Device, seed and process settings."""

    device: Device = Device.auto  # auto: CUDA where there is one, otherwise the CPU
    seed: int = 1234  # of initialisation, shuffling and sampling
    num_threads: int | None = None  # CPU threads a rank; null leaves torch's (or OMP_NUM_THREADS')
    distributed_timeout_minutes: int = 10  # a collective that waits longer ends the run
    lost_rank_seconds: float | None = 30.0  # without a sign of life from a rank's process; then the run ends. null: no watch
    stuck_rank_seconds: float | None = 40.0  # for which a rank does nothing while all others wait; then the run ends. null: never


@dataclass
class ModelConfig:
    """The policy."""

    path: str = MISSING  # a HuggingFace directory, or a checkpoint directory of this project
    precision: Precision = Precision.bf16  # of parameters and activations
    transformer_impl: TransformerImpl = TransformerImpl.auto  # of the language layers; auto: Transformer Engine where it runs
    fp8_recipe: Fp8Recipe | None = None  # products of the language layers in FP8, scaled so; needs Transformer Engine and bf16
    freeze_vision_model: bool = False  # vision tower and its mergers
    freeze_language_model: bool = False  # everything else


@dataclass
class DiscriminatorConfig:
    """The discriminator: a sparse-upcycled Qwen3-VL with a scalar head."""

    path: str | None = None  # a warmed-up discriminator (align), or the dense model to upcycle (warmup)
    precision: Precision = Precision.bf16  # of parameters and activations
    transformer_impl: TransformerImpl = TransformerImpl.auto  # of the language layers; auto: Transformer Engine where it runs
    fp8_recipe: Fp8Recipe | None = None  # products of the language layers in FP8, scaled so; needs Transformer Engine and bf16
    freeze_vision_model: bool = False  # vision tower and its mergers
    num_experts: int = 4  # 1: a dense discriminator
    moe_router_topk: int = 2  # experts a token reaches
    routing: Routing = Routing.learned  # dedicated: half of the experts for each kind of segment
    view: DiscriminatorView = DiscriminatorView.segments  # segments: perception and reasoning apart; whole: one score (GAD)
    use_images: bool = True  # false: the text-only ablation
    expert_noise_std: float = 0.01  # sparse upcycling: noise added to every expert's copy of the dense MLP
    router_init_std: float = 0.02  # of the normal distribution that starts the router
    head_init_std: float = 0.02  # of the normal distribution that starts the scalar head
    head_dropout: float = 0.0  # only while training on warm-up pairs; never while scoring
    moe_aux_loss_coeff: float = 0.01  # router load balancing
    score_regularization: float = 0.0  # coefficient of mean(score^2); the alignment game uses 1e-3


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-5  # peak learning rate
    min_lr: float = 0.0  # where linear and cosine decay end
    lr_decay_style: DecayStyle = DecayStyle.cosine  # over max_steps
    lr_warmup_fraction: float = 0.0  # of max_steps; not together with lr_warmup_iters
    lr_warmup_iters: int = 0  # steps
    weight_decay: float = 0.01  # decoupled from the gradient
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    adam_eps: float = 1e-8  # added to the root of the second moment
    clip_grad: float = 1.0  # largest global gradient norm; 0: no clipping
    cpu_offload: bool = False  # master weights and moments wait in the CPU's memory between steps; needs precision bf16


@dataclass
class MixtureSource:
    """One source of a mixture."""

    path: str = MISSING  # as data.train
    weight: float = 1.0  # of the records drawn, relative to the other sources' weights
    image_root: str | None = None  # null: data.image_root
    columns: dict[str, str] = field(default_factory=dict)  # empty: data.columns


@dataclass
class DataConfig:
    """Records, images, videos and their limits."""

    train: str | None = None  # a .json, .jsonl, .parquet or .tar file of records, a folder of them, or a pattern
    mixture: dict[str, MixtureSource] = field(default_factory=dict)  # instead of train: NAME: {path, weight, image_root, columns}
    validation: str | None = None  # held-out records in the same formats; evaluation reads these
    image_root: str | None = None  # images and videos must lie below it; null: the folder of the data file
    columns: dict[str, str] = field(default_factory=dict)  # other names for fields and roles: {messages: dialog, user_tag: human}
    cache_dir: str | None = None  # for the indexes of large data; null: ~/.cache/prism_nemo
    index_above_mb: int = 32  # data of more than so many MB is not read at the start, but record by record over an index
    system_prompt: str | None = None  # null: the prompt that asks for <caption>, <think>, <answer>
    max_prompt_length: int = 2048  # tokens, images and videos included
    max_response_length: int = 8192  # tokens
    image_min_pixels: int | None = None  # null: the processor's own
    image_max_pixels: int | None = None  # null: the processor's own
    video_fps: float = 2.0  # frames a second that the model sees of a video; where frames have timestamps: all of them
    video_min_frames: int = 4  # of a short video, as far as it has them
    video_max_frames: int = 768  # of a long video, spread over it; a video with more timestamps is refused
    video_min_pixels: int | None = None  # of all its frames together; null: the processor's own
    video_max_pixels: int | None = None  # of all its frames together; null: the processor's own
    shuffle: bool = True  # the training records, in an order fixed by the seed
    max_bad_sample_share: float = 0.01  # unusable records are counted, listed and skipped up to this share


@dataclass
class TrainerConfig:
    """Steps, batches, validation and checkpoints."""

    max_steps: int = MISSING  # steps of the whole stage, each of one batch (and of algorithm.num_mini_batches updates)
    global_batch_size: int = MISSING  # a step's SFT demonstrations, warm-up pairs, or align and RLVR prompts; all ranks together
    max_tokens_per_row: int = 10240  # a packed row, one micro-batch of one data-parallel rank, holds at most so many tokens
    val_check_interval: int = 0  # steps; 0: only at the end
    limit_val_samples: int | None = None  # null: the whole validation file
    save_interval: int = 0  # steps; 0: only at the end
    keep_last_k: int = 2  # checkpoints that stay
    async_save: bool = True  # train on while a checkpoint is written, from a copy in the host's memory
    max_save_minutes: float = 30.0  # a save that takes longer (its file system hangs) ends the run
    max_failed_saves: int = 3  # saves in a row that may fail (a full disk) before the run stops; the last of all may not
    max_bad_steps: int = 3  # consecutive steps with a non-finite loss or gradient before the run stops
    log_samples: int = 4  # rollouts written to samples.jsonl each step


@dataclass
class PolicyLossConfig:
    """The clipped surrogate; GRPO, DAPO, GSPO and Dr.GRPO are values of these."""

    ratio: RatioKind = RatioKind.token  # importance ratio of each token, or one a sequence (GSPO)
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high
    dual_clip: float | None = None  # lower bound c of the surrogate where the advantage is negative
    aggregation: Aggregation = Aggregation.token_mean  # how token losses become one number, over the global batch
    kl_coefficient: float = 0.0  # of the divergence from the reference policy; 0: no reference is loaded
    kl_estimator: KLEstimator = KLEstimator.k3  # of that divergence, per token
    reference_path: str | None = None  # the reference policy; null: model.path, where the stage starts
    rollout_correction: RolloutCorrection = RolloutCorrection.none  # weights for what sampler and trainer compute differently
    correction_truncation: float = 2.0  # those weights are at most this
    max_log_ratio: float = 20.0  # log-ratios are clamped to +- this before exp


@dataclass
class AlignAlgorithmConfig:
    """The adversarial game: advantages from the discriminator's scores."""

    perception_weight: float = 0.5  # of the group-normalised perception score
    reasoning_weight: float = 0.5  # of the group-normalised reasoning score
    format_penalty: float = 1.5  # taken off the advantage of a response in the wrong format
    score_clip: float = 10.0  # bounds the scores that the policy sees, never the discriminator's gradient
    discriminator_steps_frozen: bool = False  # keep the discriminator as warm-up left it
    min_content_probe: float | None = None  # stop before training when the content probe is below it, or cannot be measured
    reward: AlignReward = AlignReward.discriminator  # what advantages are made of; all but discriminator need verified answers
    alignment_weight: float = 1.0  # of the discriminator's advantage beside verified answers
    wrong_penalty: float = 1.0  # gated: taken off the advantage of a wrong answer
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)  # the clipped surrogate
    num_mini_batches: int = 1  # optimizer steps on one batch of rollouts, each on its share of the prompts


@dataclass
class RLVRAlgorithmConfig:
    """Advantages from verifiable rewards."""

    name: str = "grpo"  # a label for logs and reports; conf/algorithm/ holds the published settings
    normalize_std: bool = True  # false: Dr.GRPO
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)  # the clipped surrogate
    num_mini_batches: int = 1  # optimizer steps on one batch of rollouts, each on its share of the prompts
    dynamic_sampling: bool = False  # groups whose answers are all right or all wrong are replaced by other prompts' (DAPO)
    generation_batch_size: int | None = None  # prompts drawn at a time while a batch fills; null: trainer.global_batch_size
    max_generation_batches: int = 10  # a batch that is not full after so many is an error
    overlong_buffer_length: int = 0  # the last tokens of max_response_length, in which a response is penalised; 0: no penalty
    overlong_penalty_factor: float = 1.0  # the penalty at max_response_length, off the reward


@dataclass
class RewardConfig:
    """reward = accuracy_weight * correct + format_weight * valid format; 0 when the format is invalid."""

    name: str = "answer"  # the verified answer's; or a function of your own, package.module:function (docs/rewards.md)
    accuracy_weight: float = 0.8  # of a correct answer
    format_weight: float = 0.2  # of a valid response
    num_workers: int = 2  # processes that decide what needs computer algebra; they start when first needed
    time_limit_seconds: float = 0.5  # processor time for one answer (5 ms is usual); what takes longer is not equal
    memory_limit_mb: int = 1024  # address space of one such process
    cache_size: int = 100_000  # decisions of theirs that are remembered
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class ExperimentConfig:
    """The run directory and what is written into it."""

    dir: str = MISSING  # the run directory: config, metrics, samples, checkpoints
    resume: bool = True  # continue from the latest checkpoint in the directory when there is one
    resume_from_older: bool = True  # a damaged latest checkpoint: go on from the newest whole one, and say so; false: stop
    overwrite: bool = False  # start anew in a directory that already holds a run
    tensorboard: bool = True  # event files beside metrics.jsonl
    nemo_exp_manager: dict[str, Any] | None = None  # NeMo's exp_manager, by its own keys: metrics go to its loggers too
    progress: bool = True  # show progress bars


@dataclass
class SFTConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class PairsConfig:
    """Teacher/student pairs for the warm-up: the policy's own responses beside the teacher's."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    limit_samples: int | None = None  # prompts; null: the whole training file
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class WarmupConfig:
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class AlignConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    discriminator_parallel: DiscriminatorParallelConfig = field(default_factory=DiscriminatorParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlignAlgorithmConfig = field(default_factory=AlignAlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class RLVRConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: RLVRAlgorithmConfig = field(default_factory=RLVRAlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class EvalConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    also_greedy: bool = True  # evaluate a second time, always taking the likeliest token
    limit_samples: int | None = None  # prompts; null: the whole validation file
    benchmark: Benchmark | None = None  # data.validation holds its published files, a file or a folder; null: records of our own
    category: str = "category"  # metadata key that figures are broken down by; records without it go by their source
    pass_at_k: list[int] = field(default_factory=list)  # the k of pass@k and majority@k; empty: 1, 2, 4, … up to the rollouts
    bootstrap_samples: int = 1000  # resamplings of the prompts behind the 95% confidence intervals; 0: no intervals
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class CurateConfig:
    """Teacher demonstrations for the prompts that the policy fails at."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    curate: CurationConfig = field(default_factory=CurationConfig)
    teacher: EndpointConfig = field(default_factory=EndpointConfig)
    limit_samples: int | None = None  # prompts; null: the whole training file
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class GenerateConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    limit_samples: int | None = None  # prompts; null: the whole training file
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class ServeConfig:
    """A rollout server."""

    model: ModelConfig = field(default_factory=ModelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    serve: ServeSettings = field(default_factory=ServeSettings)


@dataclass
class PipelineStage:
    """One stage of a pipeline: which, from which earlier stage's output, with which overrides."""

    name: str = MISSING  # names the stage's folder under the run directory
    stage: StageKind = MISSING  # what runs
    overrides: list[str] = field(default_factory=list)  # KEY=VALUE; ${policy:NAME}, discriminator:, pairs: what stage NAME made


@dataclass
class PipelineConfig:
    seed: int = 1234  # runtime.seed of every stage, and of the digits task
    device: Device = Device.auto  # runtime.device of every stage
    stages: list[PipelineStage] = field(default_factory=list)  # in the order in which they run
    overrides: list[str] = field(default_factory=list)  # for every stage, before its own
    rollout_engine: RolloutEngineKind | None = None  # rollout.engine of every stage that samples; null: as the stages say
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    export: str | None = None  # the stage whose policy is exported to hf/ of the run directory, for transformers and vLLM
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
