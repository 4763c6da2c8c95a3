"""Device, groups, steps, attention, optimizer, checkpoints. Importing it prepares Megatron for the CPU where needed."""

import warnings as _warnings

from prism_nemo.engine import cpu as _cpu

# Megatron says at every start that it falls back without Transformer Engine and apex; here that is by design.
_warnings.filterwarnings("ignore", message=".*Apex (are|is) not installed.*")
# Megatron's checkpoints are made of ShardedTensors, and its linear layers ask for the default group; users can change neither.
_warnings.filterwarnings("ignore", message=".*deprecating ShardedTensor.*")
_warnings.filterwarnings("ignore", message=".*load_state_dict` is deprecated and will be removed.*")
_warnings.filterwarnings("ignore", message=".*tp_group is None, using default tp group.*")
_cpu.install()
