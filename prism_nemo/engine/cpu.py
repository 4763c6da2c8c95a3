"""Megatron-Core on the CPU.

Megatron names CUDA directly. Where there is no CUDA device, an import hook rewrites the source of `megatron.core.*` as it is
loaded (line numbers kept), so that `torch.cuda.` means a small stub and device strings say "cpu". That costs nothing at run time,
leaves `torch.cuda` itself alone (a patched one breaks torch.compile), and does nothing at all on a machine with CUDA.

`install()` must run before the first import of megatron; `prism_nemo.engine` does that when it is imported. The rewrite rules
were written against megatron-core 0.16.1, which is why the version is pinned.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import marshal
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(['\"])torch\.cuda\.(Float|Half|BFloat16)Tensor", r"\1torch.\2Tensor"),  # tensor types compared by name
        (r"torch\.is_tensor\(tensor\) and tensor\.is_cuda", "torch.is_tensor(tensor)"),
        (r"^(\s*)assert \w+\.is_cuda\b.*$", r"\1pass"),
        (r"(?<![\w.])torch\.cuda\.FloatTensor", "torch.FloatTensor"),
        (r"(?<![\w.])torch\.cuda\.BFloat16Tensor", "torch.BFloat16Tensor"),
        (r"(?<![\w.])torch\.cuda\.HalfTensor", "torch.HalfTensor"),
        (r"device=(['\"])cuda\1", 'device="cpu"'),
        (r"init_data\((['\"])cuda\1", 'init_data("cpu"'),
        (r"torch\.autocast\((['\"])cuda\1", 'torch.autocast("cpu"'),
        (r"pin_memory=True", "pin_memory=False"),
        (r"^enable_jit_fuser\(\)", "disable_jit_fuser()"),  # torch.compile of tiny functions: minutes on a CPU, no gain
    )
)
_STUB = "_prism_cuda."  # a global of every rewritten module
_CUDA_NAME = re.compile(r"(?<![\w.])torch\.cuda\.")


class _Nothing:
    """Stands for streams, events and graphs: accepts any call, does nothing, returns another of its kind."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _Nothing()


class _Cuda:
    """What `torch.cuda.` means inside Megatron on a machine without CUDA. Anything not named here is the real thing."""

    Stream = Event = CUDAGraph = _Nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def stream(*args: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def current_stream(*args: Any) -> _Nothing:
        return _Nothing()

    default_stream = current_stream

    class nvtx:
        range_push = range_pop = staticmethod(lambda *args: None)

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    synchronize = empty_cache = set_device = reset_peak_memory_stats = staticmethod(lambda *args, **kwargs: None)
    is_current_stream_capturing = staticmethod(lambda: False)
    memory_allocated = max_memory_allocated = memory_reserved = staticmethod(lambda *args: 0)


cuda = _Cuda()


@cache
def _rules_digest() -> str:
    """Names what this file makes of a source: another release of it reads no bytecode of this one."""
    return "prism" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def rewrite(source: str) -> str:
    """Megatron source with every use of CUDA turned to the CPU; the same number of lines."""
    lines = []
    for line in source.split("\n"):
        for pattern, replacement in _RULES:
            line = pattern.sub(replacement, line)
        if not line.lstrip().startswith(("import ", "from ", "#")):
            line = _CUDA_NAME.sub(_STUB, line)
        lines.append(line)
    return "\n".join(lines)


class _RewritingLoader(importlib.machinery.SourceFileLoader):
    """Compiles rewritten source, once: the bytecode is kept in a file beside Python's own.

    The .pyc files that other programs share hold the original and are left alone. Rewriting and compiling Megatron would take
    over half a second at every start of every rank.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        stats = self.path_stats(path)
        key = f"{path} {stats['mtime']} {stats['size']}\n".encode() + importlib.util.MAGIC_NUMBER
        cached = importlib.util.cache_from_source(path, optimization=_rules_digest())
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # not there, or damaged
            data = self.get_data(cached)
            if data.startswith(key):
                return marshal.loads(data[len(key) :])
        source = importlib.util.decode_source(self.get_data(path))
        code = compile(rewrite(source), path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            self.set_data(cached, key + marshal.dumps(code))  # at once or not at all; nothing where it may not write
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_prism_cuda"] = cuda
        super().exec_module(module)
        fix = _MODULE_FIXES.get(module.__name__)
        if fix is not None:
            fix(module)


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _RewritingLoader(spec.loader.name, spec.loader.path)
        return spec


def _fix_tensor_parallel_random(module: ModuleType) -> None:
    """The RNG tracker's states live in the CPU generator."""
    setattr(module, "_get_cuda_rng_state", lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state())  # noqa: B010
    setattr(module, "_set_cuda_rng_state", lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state))  # noqa: B010


def _fix_tensor_parallel_mappings(module: ModuleType) -> None:
    """gloo gathers and scatters equal parts only; experts cut over tensor-parallel ranks have as many tokens as come."""
    gather_equal, scatter_equal = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gather(
        tensor: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_equal(tensor, group, None, use_global_buffer)
        padded = tensor.new_zeros(max(output_split_sizes), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter(
        tensor: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter_equal(tensor, group, None, use_global_buffer)
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].contiguous()

    setattr(module, "_gather_along_first_dim", gather)  # noqa: B010
    setattr(module, "_reduce_scatter_along_first_dim", reduce_scatter)  # noqa: B010


_MODULE_FIXES: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.tensor_parallel.random": _fix_tensor_parallel_random,
    "megatron.core.tensor_parallel.mappings": _fix_tensor_parallel_mappings,
}


def install() -> None:
    """Installs the hook unless there is a CUDA device or it is already there. Fails if megatron came first."""
    if torch.cuda.is_available() or any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    early = [name for name in sys.modules if name.startswith("megatron.core")]
    assert not early, f"prism_nemo.engine must be imported before megatron ({early[0]} is loaded already)"
    sys.meta_path.insert(0, _MegatronFinder())
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
