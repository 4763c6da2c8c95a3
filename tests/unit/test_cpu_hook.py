"""Megatron on the CPU: what the import hook rewrites, and all that it must leave alone."""

from __future__ import annotations

import ast
import importlib.util
import py_compile
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prism_nemo.engine import cpu

MEGATRON = Path(str(importlib.util.find_spec("megatron.core").origin)).parent  # type: ignore[union-attr]
SOURCES = sorted(MEGATRON.rglob("*.py"))
REWRITE = cpu.rewrite


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = torch.cuda.current_device()", "x = _prism_cuda.current_device()"),
        (
            "    with torch.cuda.stream(s), torch.cuda.nvtx.range('a'):",
            "    with _prism_cuda.stream(s), _prism_cuda.nvtx.range('a'):",
        ),
        ("from torch.cuda.amp import autocast", "from torch.cuda.amp import autocast"),
        ("# torch.cuda.synchronize() is slow", "# torch.cuda.synchronize() is slow"),
        ("y = my_torch.cuda.z + other.torch.cuda.z", "y = my_torch.cuda.z + other.torch.cuda.z"),
        ("'torch.cuda.FloatTensor', \"torch.cuda.BFloat16Tensor\"", "'torch.FloatTensor', \"torch.BFloat16Tensor\""),
        ("t = torch.cuda.HalfTensor([0])", "t = torch.HalfTensor([0])"),
        ("torch.empty(3, device='cuda')", 'torch.empty(3, device="cpu")'),
        ('torch.empty(3, device="cuda:0")', 'torch.empty(3, device="cuda:0")'),
        ("torch.zeros(1, pin_memory=True)", "torch.zeros(1, pin_memory=False)"),
        ("    assert tensor.is_cuda, 'where?'", "    pass"),
        ("    if torch.is_tensor(tensor) and tensor.is_cuda:", "    if torch.is_tensor(tensor):"),
        ("enable_jit_fuser()", "disable_jit_fuser()"),
        ("def enable_jit_fuser():", "def enable_jit_fuser():"),
    ],
)
def test_one_line(line: str, expected: str) -> None:
    assert cpu.rewrite(line) == expected


def test_every_megatron_source_keeps_its_lines_and_still_parses() -> None:
    """And no use of `torch.cuda.` outlives the rewrite."""
    assert len(SOURCES) > 200
    stubbed = 0
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        rewritten = cpu.rewrite(source)
        assert rewritten.count("\n") == source.count("\n"), path
        if rewritten != source:
            assert _cuda_uses(ast.parse(rewritten)) == 0, path
            stubbed += rewritten.count("_prism_cuda.")
        else:
            assert not re.search(r"^(?!\s*import ).*torch\.cuda\.", source, re.MULTILINE), path
    assert stubbed > 100


def _cuda_uses(tree: ast.AST) -> int:
    """How often the code says `torch.cuda.something`."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "cuda":
            found += isinstance(node.value.value, ast.Name) and node.value.value.id == "torch"
    return found


def load(path: Path) -> ModuleType:
    loader = cpu._RewritingLoader(path.stem, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.stem, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def test_loader_rewrites_and_leaves_the_cached_bytecode_alone(tmp_path: Path) -> None:
    path = tmp_path / "uses_cuda.py"
    path.write_text("import torch\nwhere = torch.cuda.current_device()\n")
    cached = Path(py_compile.compile(str(path)))  # as another program would have left it
    before = cached.read_bytes()
    assert load(path).where == torch.device("cpu")
    assert cached.read_bytes() == before


def test_loader_keeps_its_own_bytecode_as_long_as_it_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten = []
    monkeypatch.setattr(cpu, "rewrite", lambda source: rewritten.append(source) or REWRITE(source))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = tmp_path / "module.py"
    path.write_text("where = 1\n")
    assert (load(path).where, load(path).where) == (1, 1)
    assert len(rewritten) == 1
    (kept,) = tmp_path.rglob("*.pyc")
    whole = kept.read_bytes()
    for damaged in (whole[:-3], whole[:10], b"", b"other" + whole):
        kept.write_bytes(damaged)
        assert load(path).where == 1
    assert len(rewritten) == 5
    assert kept.read_bytes() == whole
    path.write_text("where = 22\n")
    assert load(path).where == 22
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    assert load(moved / path.name).where == 22
    assert len(rewritten) == 7  # so that tracebacks name the file where it now is


def test_loader_without_a_place_for_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "module.py"
    path.write_text("where = 1\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert load(path).where == 1
    assert not list(tmp_path.rglob("*.pyc"))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "__pycache__").write_text("a file where the folder should be")
    assert load(path).where == 1


def test_errors_name_the_line_of_the_original(tmp_path: Path) -> None:
    path = tmp_path / "fails.py"
    path.write_text(
        "import torch\n\ntensor = torch.ones(1)\nassert tensor.is_cuda\nwith torch.cuda.stream(None):\n    tensor.fail()\n"
    )
    for _ in range(2):  # compiled, and from the bytecode that was kept
        with pytest.raises(AttributeError, match="fail") as caught:
            load(path)
    last = caught.traceback[-1]
    assert (Path(last.path), last.lineno + 1) == (path, 6)


@pytest.fixture
def without_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import machinery as it was before prism_nemo.engine."""
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, cpu._MegatronFinder)])
    for owner, name in ((torch.Tensor, "cuda"), (torch.nn.Module, "cuda"), (torch.Tensor, "record_stream")):
        monkeypatch.setattr(owner, name, f"the original {name}")


@pytest.mark.usefixtures("without_hook")
def test_nothing_happens_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finders = list(sys.meta_path)
    cpu.install()
    assert sys.meta_path == finders
    assert (torch.Tensor.cuda, torch.nn.Module.cuda) == ("the original cuda",) * 2
    assert torch.Tensor.record_stream == "the original record_stream"


@pytest.mark.usefixtures("without_hook")
def test_installing_twice_installs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "modules", {name: module for name, module in sys.modules.items() if not name.startswith("megatron")})
    cpu.install()
    cpu.install()
    assert sum(isinstance(finder, cpu._MegatronFinder) for finder in sys.meta_path) == 1
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.record_stream(None) is None


def test_stub_does_nothing_and_keeps_the_random_state() -> None:
    stub = cpu.cuda
    with stub.stream(stub.Stream()), stub.Event(enable_timing=True) as event:
        event.record(stub.current_stream())
        event.wait().query()
    stub.synchronize()
    stub.nvtx.range_push("a")
    assert stub.memory_allocated() == 0
    with torch.random.fork_rng():
        stub.manual_seed(3)
        state = stub.get_rng_state()
        first = torch.rand(4)
        stub.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
    assert stub.is_available is torch.cuda.is_available  # all else is the real thing
    with pytest.raises(AttributeError):
        _ = stub.no_such_function


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_megatron_first_fails_loudly() -> None:
    if torch.cuda.is_available():
        pytest.skip("with CUDA the order does not matter")
    result = run_python("import megatron.core\nimport prism_nemo.engine")
    assert result.returncode != 0
    assert re.search(r"AssertionError: prism_nemo\.engine must be imported before megatron \(megatron\.core", result.stderr)


def test_torch_cuda_itself_is_untouched() -> None:
    """A patched `torch.cuda` breaks torch.compile, so that the same objects must be there after Megatron was loaded and used."""
    code = """
import torch
before = dict(vars(torch.cuda))
import prism_nemo.engine
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import clip_grads
from megatron.core.transformer.transformer_layer import TransformerLayer
tensor_parallel.model_parallel_cuda_manual_seed
changed = [name for name, value in before.items() if vars(torch.cuda)[name] is not value]
assert not changed, changed
assert not isinstance(torch.cuda, prism_nemo.engine._cpu._Cuda)
assert vars(tensor_parallel.random)["_prism_cuda"] is prism_nemo.engine._cpu.cuda
try:
    torch.cuda.current_device()
except (AssertionError, RuntimeError):
    print("real")
"""
    if torch.cuda.is_available():
        pytest.skip("there is no hook with CUDA")
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "real"
