"""Every configuration key, its type, its meaning and its one default.

The YAML files in `conf/` compose over these dataclasses; an unknown key or a wrong type fails before anything heavy is
imported. Names follow Megatron and NeMo where they have one. Units stand in names, meanings in the comment behind a field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Precision(str, Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class Device(str, Enum):
    auto = "auto"  # CUDA where there is one, otherwise the CPU
    cpu = "cpu"
    cuda = "cuda"


class Routing(str, Enum):
    learned = "learned"  # a token may reach any expert
    dedicated = "dedicated"  # a segment's tokens reach only the expert pool of their kind


class DiscriminatorView(str, Enum):
    segments = "segments"  # perception and reasoning are scored apart (PRISM)
    whole = "whole"  # one score for the whole response (GAD)


class RatioKind(str, Enum):
    token = "token"  # importance ratio of each token
    sequence = "sequence"  # GSPO: one ratio a sequence, exp(mean_t dlogp)


class Aggregation(str, Enum):
    token_mean = "token_mean"  # sum over all tokens / number of tokens in the global batch
    sequence_mean = "sequence_mean"  # mean over sequences of each one's token mean
    constant_length = "constant_length"  # Dr.GRPO: sum over tokens / (sequences * max response length)


class RolloutEngineKind(str, Enum):
    megatron = "megatron"
    vllm = "vllm"


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # None: the tensor-parallel size when experts are not distributed, otherwise 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False


@dataclass
class RuntimeConfig:
    device: Device = Device.auto
    seed: int = 1234
    num_threads: int | None = None  # CPU threads a rank; None leaves torch's (or OMP_NUM_THREADS')
    distributed_timeout_minutes: int = 10


@dataclass
class ModelConfig:
    path: str = MISSING  # a HuggingFace directory, or a checkpoint directory of this project
    precision: Precision = Precision.bf16
    freeze_vision_model: bool = False
    freeze_language_model: bool = False


@dataclass
class DiscriminatorConfig:
    path: str | None = None  # a discriminator checkpoint (align), or the dense model to upcycle (warmup)
    precision: Precision = Precision.bf16
    freeze_vision_model: bool = False
    num_experts: int = 4  # 1: a dense discriminator
    moe_router_topk: int = 2
    routing: Routing = Routing.learned
    view: DiscriminatorView = DiscriminatorView.segments
    use_images: bool = True  # False: the text-only ablation
    expert_noise_std: float = 0.01  # sparse upcycling: noise added to every expert's copy of the dense MLP
    router_init_std: float = 0.02
    head_init_std: float = 0.02
    head_dropout: float = 0.0  # only while training on warm-up pairs; never while scoring
    moe_aux_loss_coeff: float = 0.01  # router load balancing
    score_regularization: float = 0.0  # coefficient of mean(score^2); the alignment game uses 1e-3
    max_segment_length: int = 8192  # tokens, teacher and student alike


@dataclass
class OptimizerConfig:
    lr: float = 1e-5
    min_lr: float = 0.0
    lr_decay_style: str = "cosine"  # constant | linear | cosine
    lr_warmup_fraction: float = 0.0  # of max_steps; not together with lr_warmup_iters
    lr_warmup_iters: int = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class DataConfig:
    train: str | None = None  # a .json, .jsonl or .parquet file of records
    validation: str | None = None
    image_root: str | None = None  # images must lie below it; None: the folder of the data file
    system_prompt: str | None = None  # None: the prompt that asks for <caption>, <think>, <answer>
    max_prompt_length: int = 2048  # tokens, images included
    max_response_length: int = 8192  # tokens
    image_min_pixels: int | None = None  # None: the processor's own
    image_max_pixels: int | None = None
    shuffle: bool = True
    max_bad_sample_share: float = 0.01  # unusable records are counted, listed and skipped up to this share


@dataclass
class TrainerConfig:
    max_steps: int = MISSING
    global_batch_size: int = MISSING  # SFT: demonstrations, warm-up: pairs, align and RLVR: prompts
    max_tokens_per_row: int = 8192  # a packed row, one micro-batch of one data-parallel rank, holds at most so many tokens
    val_check_interval: int = 0  # steps; 0: only at the end
    limit_val_samples: int | None = None
    save_interval: int = 0  # steps; 0: only at the end
    keep_last_k: int = 2
    max_bad_steps: int = 3  # consecutive steps with a non-finite loss or gradient before the run stops
    log_samples: int = 4  # rollouts written to samples.jsonl each step


@dataclass
class RolloutConfig:
    engine: RolloutEngineKind = RolloutEngineKind.megatron
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_batch_size: int = 256  # sequences decoded together
    num_rollouts_per_prompt: int = 16


@dataclass
class PolicyLossConfig:
    ratio: RatioKind = RatioKind.token
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # lower bound c of the surrogate where the advantage is negative
    aggregation: Aggregation = Aggregation.token_mean
    kl_coefficient: float = 0.0
    max_log_ratio: float = 20.0


@dataclass
class AlignAlgorithmConfig:
    perception_weight: float = 0.5
    reasoning_weight: float = 0.5
    format_penalty: float = 1.5
    score_clip: float = 10.0  # bounds the scores that the policy sees, never the discriminator's gradient
    discriminator_steps_frozen: bool = False  # keep the discriminator as warm-up left it
    min_content_probe: float | None = None  # stop before training when the content probe is below it
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)


@dataclass
class RLVRAlgorithmConfig:
    name: str = "grpo"
    normalize_std: bool = True  # False: Dr.GRPO
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)


@dataclass
class RewardConfig:
    accuracy_weight: float = 0.8
    format_weight: float = 0.2


@dataclass
class ExperimentConfig:
    dir: str = MISSING  # the run directory: config, metrics, samples, checkpoints
    resume: bool = True  # continue from the latest checkpoint in the directory when there is one
    overwrite: bool = False  # start anew in a directory that already holds a run
    tensorboard: bool = True
    progress: bool = True


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
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlignAlgorithmConfig = field(default_factory=AlignAlgorithmConfig)
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
    limit_samples: int | None = None
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)


@dataclass
class PipelineStage:
    """One stage of a pipeline: which, from which earlier stage's output, with which overrides."""

    name: str = MISSING  # names the stage's folder under the run directory
    stage: str = MISSING  # sft | pairs | warmup | align | rlvr | eval
    overrides: list[str] = field(default_factory=list)  # as on the command line; ${policy:NAME}, ${discriminator:NAME}: outputs of stage NAME


@dataclass
class PipelineConfig:
    seed: int = 1234
    stages: list[PipelineStage] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)  # for every stage, before its own
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
