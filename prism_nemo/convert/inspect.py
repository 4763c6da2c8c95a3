"""`prism-nemo convert inspect`: what a directory is, and whether it is whole.

Nothing but headers and indexes is read; with `--hashes` all files of a checkpoint are, and compared with its manifest.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from prism_nemo.convert import manifest
from prism_nemo.convert.checkpoint_keys import find_wrapper
from prism_nemo.convert.hf import CONFIG_FILE, load_model_config
from prism_nemo.convert.hf_reader import HFReader, has_score_head
from prism_nemo.convert.qwen3_vl import MEGATRON_SCORE_HEAD, Config, hf_shapes, hub_config
from prism_nemo.convert.sources import CheckpointSource
from prism_nemo.convert.torch_dist import METADATA, OPTIMIZER_UPDATES, TorchDistCheckpoint, is_torch_dist, read_content
from prism_nemo.errors import CheckpointError, PrismError
from prism_nemo.json_files import read_json_object
from prism_nemo.printable import printable
from prism_nemo.run_directory import LATEST

_TRAINER = "trainer.json"  # of a step's folder


@dataclass
class Description:
    """What one folder holds. `problems` is empty when it is whole."""

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    parts: list[Description] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.problems and all(part.whole for part in self.parts)


def run(options: argparse.Namespace) -> bool:
    """Prints the description; True when the directory is whole."""
    description = describe(options.directory, hashes=options.hashes)
    if options.json:
        print(json.dumps(asdict(description) | {"whole": description.whole}, indent=1))
    else:
        print("\n".join(map(printable, _lines(description))))
    return description.whole


def describe(path: Path, *, hashes: bool = False) -> Description:
    """Raises CheckpointError when the directory is nothing that this project knows."""
    if not path.is_dir():
        raise CheckpointError("no such directory", where=str(path), remedy="the right path")
    if path.name.startswith(".") and path.name.endswith(".partial"):
        return _conversion(path)
    if (path / METADATA).is_file() or is_torch_dist(path) or (path / manifest.MANIFEST).is_file():
        return _checkpoint(path, hashes)
    models = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and (entry / manifest.MANIFEST).is_file()]
    if (path / _TRAINER).is_file() or models:
        return _step(path, models, hashes)
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file() or (folder != path and folder.is_dir()):
            return _run(path, folder, hashes)
    if (path / CONFIG_FILE).is_file():
        return _huggingface(path)
    raise CheckpointError(
        "not a directory of a model",
        where=str(path),
        remedy=f"a HuggingFace directory ({CONFIG_FILE}, safetensors), a checkpoint, a step of one, or a run",
    )


def _huggingface(path: Path) -> Description:
    result = Description(str(path), "HuggingFace directory")
    try:
        config = load_model_config(path)
        with HFReader(path) as reader:
            score_head = has_score_head(reader)
            result.facts |= _model_facts(config, score_head)
            dtypes = Counter(reader.dtype(name).code for name in reader.names)
            result.facts["type"] = ", ".join(name for name, _ in dtypes.most_common())
            result.facts["files"] = len(reader.weight_files)
            result.facts["bytes"] = sum(file.stat().st_size for file in reader.weight_files)
            layout = reader.check(config, score_head=score_head)
            if config["text_config"].get("num_experts"):
                result.facts["expert layout"] = layout.value
    except PrismError as error:
        result.problems.append(error.what)
    result.facts["tokenizer"] = any((path / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return result


def _checkpoint(path: Path, hashes: bool) -> Description:
    result = Description(str(path), "checkpoint (torch_dist)")
    ours = (path / manifest.MANIFEST).is_file()
    if ours:
        result.problems += manifest.problems(path, contents=hashes)
        result.facts |= {"files that are hashed": manifest.count(path)} if hashes else {}
    elif not is_torch_dist(path):
        result.problems.append("metadata.json is missing")
    try:
        stored = TorchDistCheckpoint(path)
    except CheckpointError as error:
        result.problems.append(error.what)
        return result
    wrapper = find_wrapper(stored.tensors)
    score_head = f"{wrapper or ''}{MEGATRON_SCORE_HEAD}" in stored.tensors
    content = read_content(path)
    optimizer = content.get(OPTIMIZER_UPDATES, any(key.startswith("optimizer.") for key in stored.tensors))
    result.facts |= {"optimizer state": bool(optimizer), "written by": "this project" if ours else "another tool"}
    weights = [tensor for key, tensor in stored.tensors.items() if not key.startswith("optimizer.")]
    result.facts["type"] = ", ".join(sorted({str(tensor.dtype) for tensor in weights}))
    result.facts["layout"] = _layout(stored)
    result.facts["files"] = len(stored.files)
    result.facts["bytes"] = sum(file.stat().st_size for file in stored.files if file.is_file())
    result.problems += [f"{file.name} is missing" for file in stored.files if not file.is_file() and not ours]
    try:
        config = load_model_config(path)
        result.facts |= _model_facts(config, score_head)
        CheckpointSource(stored, config, score_head=score_head)
    except PrismError as error:
        if ours or (path / "hf").is_dir():
            result.problems.append(error.what)
        else:
            result.facts["parameters"] = sum(prod(tensor.shape) for tensor in weights)
    return result


def _layout(stored: TorchDistCheckpoint) -> str:
    """How the saving ranks had cut the model, as far as the pieces show it."""
    writers = {file.name.split("_")[2] for file in stored.files if file.name.startswith("__")}
    embedding = stored.tensors.get(f"{find_wrapper(stored.tensors) or ''}language_model.embedding.word_embeddings.weight")
    tensor_parallel = len(embedding.chunks) if embedding is not None else 1
    return f"written by {len(writers)} rank{'s'[: len(writers) != 1]}, tensor-parallel size {tensor_parallel}; loads at any"


def _step(path: Path, models: list[Path], hashes: bool) -> Description:
    result = Description(str(path), "step of a run" if (path / _TRAINER).is_file() else "checkpoint folder")
    try:
        trainer = read_json_object(path / _TRAINER) if (path / _TRAINER).is_file() else {}
        result.facts |= {key: trainer[key] for key in ("step", "world_size", "consumed_samples") if key in trainer}
    except PrismError:
        result.problems.append(f"{_TRAINER} is not JSON")
    if (path / manifest.STEP_MANIFEST).is_file():
        result.problems += manifest.problems(path, contents=hashes, manifest=manifest.STEP_MANIFEST)
    result.parts = [_checkpoint(model, hashes) for model in models]
    if not models:
        result.problems.append("it holds no model")
    return result


def _run(path: Path, folder: Path, hashes: bool) -> Description:
    result = Description(str(path), "run" if folder != path else "checkpoints of a run")
    steps = sorted(entry for entry in folder.iterdir() if entry.name.startswith("step_"))
    result.facts["steps"] = ", ".join(step.name.removeprefix("step_").lstrip("0") or "0" for step in steps) or "none"
    unfinished = [entry.name for entry in folder.iterdir() if entry.name.startswith(".") and entry.name.endswith(".partial")]
    if unfinished:
        result.facts["unfinished"] = ", ".join(unfinished)
    latest = folder / LATEST
    if not latest.is_file():
        result.problems.append("no checkpoint is complete yet")
        return result
    name = latest.read_text().strip()
    result.facts["latest"] = name
    newest = folder / name
    if not newest.is_dir():
        result.problems.append(f"{LATEST} names {name}, which is not there")
        return result
    result.parts = [describe(newest, hashes=hashes)]
    return result


def _conversion(path: Path) -> Description:
    result = Description(str(path), "conversion under way, or cut off")
    try:
        plan = read_json_object(path / "plan.json")
        done = sum(entry.is_file() and not entry.name.startswith(".") for entry in (path / "journal").iterdir())
        result.facts |= {"to": plan.get("to"), "files": f"{done} of {len(plan['write'])} are finished"}
    except (PrismError, OSError, ValueError, TypeError, KeyError):
        pass
    result.problems.append("it is not finished; the same command goes on with it")
    return result


def _model_facts(config: Config, score_head: bool) -> dict[str, Any]:
    config = hub_config(config)
    text = config["text_config"]
    shapes = hf_shapes({**config, "tie_word_embeddings": True} if score_head else config, score_head=score_head)
    facts: dict[str, Any] = {
        "model": "discriminator" if score_head else "policy",
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "language": f"{text['num_hidden_layers']} layers, hidden {text['hidden_size']}",
        "vision": f"{config['vision_config']['depth']} layers, hidden {config['vision_config']['hidden_size']}",
        "tied embeddings": bool(config["tie_word_embeddings"]),
    }
    if text.get("num_experts"):
        facts["experts"] = f"{text['num_experts']}, {text['num_experts_per_tok']} of them for a token"
    return facts


def _lines(description: Description, indent: str = "") -> list[str]:
    lines = [f"{indent}{description.path}: {description.kind}"]
    for name, value in description.facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else shown
        lines.append(f"{indent}  {name}: {shown}")
    for part in description.parts:
        lines += _lines(part, indent + "  ")
    lines += [f"{indent}  NOT WHOLE: {problem}" for problem in description.problems]
    if description.whole:
        lines.append(f"{indent}  whole")
    return lines
