"""The range of every number in the schema."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from prism_nemo.config.digits import DigitsConfig
from prism_nemo.config.endpoint import CurationConfig, EndpointConfig, JudgeConfig
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig, ServeSettings, VLLMConfig
from prism_nemo.config.schema import (
    AlignAlgorithmConfig,
    CurateConfig,
    DataConfig,
    DiscriminatorConfig,
    EvalConfig,
    GenerateConfig,
    MixtureSource,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    PipelineConfig,
    PolicyLossConfig,
    RewardConfig,
    RLVRAlgorithmConfig,
    RuntimeConfig,
    TrainerConfig,
)
from prism_nemo.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds; `open` names the sides that do not belong to it."""

    low: float
    high: float = math.inf
    open: str = ""  # "", "low", "high" or "low high"

    def __contains__(self, value: float) -> bool:
        above = value > self.low if "low" in self.open else value >= self.low
        below = value < self.high if "high" in self.open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'above' if 'low' in self.open else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if 'high' in self.open else 'at most'} {self.high:g}"


COUNT = Range(1)
COUNT_OR_NONE = Range(0)
FRAMES = Range(2)  # two make one patch in time
POSITIVE = Range(0.0, open="low")
NOT_NEGATIVE = Range(0.0)
SHARE = Range(0.0, 1.0)
BELOW_ONE = Range(0.0, 1.0, open="high")
POSITIVE_SHARE = TOP_P = Range(0.0, 1.0, open="low")
IMAGE_DISTANCE = Range(0, 7)  # what eight bands of a 256-bit hash find for certain
STALENESS = Range(0, 1)  # batches
CONCURRENCY = Range(1, 1024)
SILENCE = Range(3.0)  # seconds; a sign of life comes every second
PORT = Range(0, 65535)
DUAL_CLIP = Range(1.0, open="low")

RANGES: dict[type, dict[str, Range]] = {
    ParallelConfig: {
        "tensor_model_parallel_size": COUNT,
        "pipeline_model_parallel_size": COUNT,
        "virtual_pipeline_model_parallel_size": COUNT,
        "context_parallel_size": COUNT,
        "expert_model_parallel_size": COUNT,
        "expert_tensor_parallel_size": COUNT,
        "num_layers_in_first_pipeline_stage": COUNT,
        "num_layers_in_last_pipeline_stage": COUNT,
    },
    RuntimeConfig: {
        "seed": COUNT_OR_NONE,
        "num_threads": COUNT,
        "distributed_timeout_minutes": COUNT,
        "lost_rank_seconds": SILENCE,
        "stuck_rank_seconds": SILENCE,
    },
    DiscriminatorConfig: {
        "num_experts": COUNT,
        "moe_router_topk": COUNT,
        "expert_noise_std": NOT_NEGATIVE,
        "router_init_std": NOT_NEGATIVE,
        "head_init_std": POSITIVE,
        "head_dropout": BELOW_ONE,
        "moe_aux_loss_coeff": NOT_NEGATIVE,
        "score_regularization": NOT_NEGATIVE,
    },
    OptimizerConfig: {
        "lr": POSITIVE,
        "min_lr": NOT_NEGATIVE,
        "lr_warmup_fraction": BELOW_ONE,
        "lr_warmup_iters": COUNT_OR_NONE,
        "weight_decay": NOT_NEGATIVE,
        "adam_beta1": BELOW_ONE,
        "adam_beta2": BELOW_ONE,
        "adam_eps": POSITIVE,
        "clip_grad": NOT_NEGATIVE,
    },
    MixtureSource: {"weight": POSITIVE},
    DataConfig: {
        "index_above_mb": COUNT_OR_NONE,
        "max_prompt_length": COUNT,
        "max_response_length": COUNT,
        "image_min_pixels": COUNT,
        "image_max_pixels": COUNT,
        "video_fps": POSITIVE,
        "video_min_frames": FRAMES,
        "video_max_frames": FRAMES,
        "video_min_pixels": COUNT,
        "video_max_pixels": COUNT,
        "max_bad_sample_share": SHARE,
    },
    TrainerConfig: {
        "max_steps": COUNT,
        "global_batch_size": COUNT,
        "max_tokens_per_row": COUNT,
        "val_check_interval": COUNT_OR_NONE,
        "limit_val_samples": COUNT,
        "save_interval": COUNT_OR_NONE,
        "keep_last_k": COUNT,
        "max_save_minutes": POSITIVE,
        "max_failed_saves": COUNT,
        "max_bad_steps": COUNT,
        "log_samples": COUNT_OR_NONE,
    },
    RolloutConfig: {
        "temperature": NOT_NEGATIVE,
        "top_p": TOP_P,
        "top_k": COUNT_OR_NONE,
        "max_batch_size": COUNT,
        "num_rollouts_per_prompt": COUNT,
        "time_limit_seconds": POSITIVE,
        "max_staleness": STALENESS,
    },
    VLLMConfig: {
        "tensor_model_parallel_size": COUNT,
        "gpu_memory_utilization": POSITIVE_SHARE,
        "kv_cache_gb": POSITIVE,
        "max_num_batched_tokens": COUNT,
    },
    RolloutServersConfig: {
        "num_replicas": COUNT,
        "startup_timeout_seconds": POSITIVE,
        "request_timeout_seconds": POSITIVE,
        "control_timeout_seconds": POSITIVE,
        "prompts_per_request": COUNT,
        "requests_per_replica": COUNT,
        "weight_bucket_mb": COUNT,
    },
    ServeSettings: {"port": PORT, "max_request_mb": COUNT, "parent_fd": COUNT_OR_NONE},
    PolicyLossConfig: {
        "clip_low": SHARE,
        "clip_high": NOT_NEGATIVE,
        "dual_clip": DUAL_CLIP,
        "kl_coefficient": NOT_NEGATIVE,
        "correction_truncation": POSITIVE,
        "max_log_ratio": POSITIVE,
    },
    AlignAlgorithmConfig: {
        "perception_weight": NOT_NEGATIVE,
        "reasoning_weight": NOT_NEGATIVE,
        "format_penalty": NOT_NEGATIVE,
        "score_clip": POSITIVE,
        "min_content_probe": SHARE,
        "alignment_weight": NOT_NEGATIVE,
        "wrong_penalty": NOT_NEGATIVE,
        "num_mini_batches": COUNT,
    },
    RLVRAlgorithmConfig: {
        "num_mini_batches": COUNT,
        "generation_batch_size": COUNT,
        "max_generation_batches": COUNT,
        "overlong_buffer_length": COUNT_OR_NONE,
        "overlong_penalty_factor": NOT_NEGATIVE,
    },
    RewardConfig: {
        "accuracy_weight": NOT_NEGATIVE,
        "format_weight": NOT_NEGATIVE,
        "num_workers": COUNT,
        "time_limit_seconds": POSITIVE,
        "memory_limit_mb": Range(256),  # a worker itself takes about 100
        "cache_size": COUNT_OR_NONE,
    },
    EvalConfig: {"limit_samples": COUNT, "bootstrap_samples": COUNT_OR_NONE},
    PairsConfig: {"limit_samples": COUNT},
    CurateConfig: {"limit_samples": COUNT},
    GenerateConfig: {"limit_samples": COUNT},
    CurationConfig: {
        "max_solved_share": BELOW_ONE,
        "max_answers": COUNT,
        "image_max_pixels": COUNT,
        "min_similarity": POSITIVE_SHARE,
        "max_image_distance": IMAGE_DISTANCE,
        "exclude_min_words": COUNT_OR_NONE,
    },
    EndpointConfig: {
        "temperature": NOT_NEGATIVE,
        "max_tokens": COUNT,
        "max_concurrency": CONCURRENCY,
        "timeout_seconds": POSITIVE,
        "max_attempts": COUNT,
        "backoff_seconds": NOT_NEGATIVE,
        "max_response_bytes": COUNT,
        "max_requests": COUNT_OR_NONE,
        "max_prompt_tokens": COUNT_OR_NONE,
        "max_completion_tokens": COUNT_OR_NONE,
        "max_cost": NOT_NEGATIVE,
        "prompt_price": NOT_NEGATIVE,
        "completion_price": NOT_NEGATIVE,
    },
    JudgeConfig: {"max_answer_length": COUNT},
    DigitsConfig: {"num_public": COUNT, "num_teacher": COUNT, "num_prompts": COUNT, "num_test": COUNT},
    PipelineConfig: {"seed": COUNT_OR_NONE},
}


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raises ConfigError for the first number of a configuration that lies outside its range."""
    ranges = {name: limits for base in type(config).__mro__ for name, limits in RANGES.get(base, {}).items()}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, prefix=f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    check_ranges(entry, prefix=f"{key}.{name}.")
        elif field.name in ranges and value is not None and value not in ranges[field.name]:
            raise ConfigError(f"{key} is {value:g}", where=key, remedy=f"it must be {ranges[field.name]}")
