"""Rollouts by vLLM in the training processes: an engine a rank, or one over several, with the policy's weights after every step.

Prompts reach it as they reach the policy: image tokens expanded, patches as they are. vLLM sees no image and tokenizes no text,
so that the two can only differ in how they compute. What is worth knowing about the library stands where it is dealt with.
"""

import os

import torch

# Read as vLLM is imported. One process: the weights are handed over as Python objects.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The runner whose parts `worker.py` knows. Where Triton works, as on GPUs, vLLM would take its second one, which has others.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks share the cores
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or the first log-probabilities compile C++ for up to a minute

from prism_nemo.rollout.vllm.engine import VLLMEngine
from prism_nemo.rollout.vllm.start import ServedModel

__all__ = ["ServedModel", "VLLMEngine"]
