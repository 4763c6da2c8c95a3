"""Models on Megatron-Core."""

import prism_nemo.engine  # noqa: F401  before any megatron import: prepares Megatron for machines without CUDA
