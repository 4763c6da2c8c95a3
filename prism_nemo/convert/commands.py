"""`prism-nemo convert`: checkpoints from and to HuggingFace directories, tensor by tensor, on one process or several.

No model is built and no tensor but the one at hand is in memory. What is written becomes visible when it is whole; after a kill
the same command goes on where it was (`shards.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_nemo.convert import manifest
from prism_nemo.convert.checkpoint_keys import find_wrapper
from prism_nemo.convert.hf import copy_assets, hf_assets_directory, load_model_config
from prism_nemo.convert.hf_reader import HFReader, has_score_head
from prism_nemo.convert.plans import plan_checkpoint, plan_hf
from prism_nemo.convert.qwen3_vl import MEGATRON_SCORE_HEAD, hf_shapes
from prism_nemo.convert.ranks import ALONE, Ranks
from prism_nemo.convert.shards import Staging, TargetFile
from prism_nemo.convert.sources import CheckpointSource, HFSource, Source
from prism_nemo.convert.torch_dist import METADATA, TorchDistCheckpoint
from prism_nemo.errors import CheckpointError
from prism_nemo.run_directory import resolve_model_directory

if TYPE_CHECKING:
    from prism_nemo.config.schema import DiscriminatorConfig

POLICY, DISCRIMINATOR = "policy", "discriminator"  # the folders that models have in a step's checkpoint
_PLAN_VERSION = 2


def import_hf(hf: Path, out: Path, *, ranks: Ranks = ALONE, max_shard_bytes: int | None = None, quiet: bool = True) -> None:
    """Writes a checkpoint of this project, in the weights' own precision, from a HuggingFace directory.

    A directory with a scalar head is a discriminator's; its checkpoint is `out`/discriminator, where stages look for it. Raises
    CheckpointError when `out` exists, and for whatever is wrong with the directory, before anything is written.
    """
    with ExitStack() as stack:
        with ranks.together():
            config = load_model_config(hf)
            reader = stack.enter_context(HFReader(hf))
            score_head = has_score_head(reader)
            if score_head:
                config = headless(config)
            source = HFSource(reader, config, score_head=score_head)
        write_checkpoint(source, config, hf, out, score_head=score_head, ranks=ranks, max_bytes=max_shard_bytes, quiet=quiet)


def import_megatron(
    checkpoint: Path,
    model: Path,
    out: Path,
    *,
    ranks: Ranks = ALONE,
    max_shard_bytes: int | None = None,
    quiet: bool = True,
) -> None:
    """Writes a checkpoint of this project from another `torch_dist` checkpoint of the same model, such as Megatron-Bridge's.

    `model` has its config.json, tokenizer and processor. Layers may be numbered or stacked, vocabularies padded.
    """
    with ExitStack() as stack:
        with ranks.together():
            stored = TorchDistCheckpoint(checkpoint)
            config = load_model_config(model)
            score_head = _has_score_head(stored)
            if score_head:
                config = headless(config)
            source = CheckpointSource(stored, config, score_head=score_head)
            stack.callback(source.io.close)
        write_checkpoint(source, config, model, out, score_head=score_head, ranks=ranks, max_bytes=max_shard_bytes, quiet=quiet)


def upcycle_hf(
    dense: Path,
    out: Path,
    options: DiscriminatorConfig,
    *,
    seed: int,
    ranks: Ranks = ALONE,
    max_shard_bytes: int | None = None,
    quiet: bool = True,
) -> None:
    """Writes the checkpoint of the discriminator that a dense model becomes, as the warm-up stage would start from it.

    `dense` is a HuggingFace directory or a policy's checkpoint (a run, a step, its folder).
    """
    from prism_nemo.convert.upcycling import UpcycledSource, upcycled_config

    with ExitStack() as stack:
        with ranks.together():
            source, assets, config = open_dense(dense, stack)
            upcycled = upcycled_config(config, options)
            target = UpcycledSource(source, upcycled, options, seed=seed)
        drawn = {
            "seed": seed,
            "stds": [options.expert_noise_std, options.router_init_std, options.head_init_std],
            "experts": [options.num_experts, options.moe_router_topk],
        }
        write_checkpoint(
            target,
            upcycled,
            assets,
            out,
            score_head=True,
            ranks=ranks,
            options=drawn,
            max_bytes=max_shard_bytes,
            quiet=quiet,
        )


def open_dense(path: Path, stack: ExitStack) -> tuple[Source, Path, dict[str, Any]]:
    """The parameters of a policy, the directory of its config.json, and that."""
    directory = resolve_model_directory(path, POLICY)
    config = load_model_config(directory)
    if (directory / METADATA).is_file():
        manifest.check_manifest(directory)
        source: Source = CheckpointSource(TorchDistCheckpoint(directory), config)
        stack.callback(source.io.close)
    else:
        source = HFSource(stack.enter_context(HFReader(directory)), config)
    return source, hf_assets_directory(directory), config


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    model: str | None = None,
    ranks: Ranks = ALONE,
    max_shard_bytes: int | None = None,
    quiet: bool = True,
) -> None:
    """Writes a HuggingFace directory (Hub layout, tokenizer and processor included) from a model's checkpoint.

    `checkpoint` may be a run, its `checkpoints`, a step, or the model's own folder; `model` says whose where a step has several
    (by default the policy's). Raises CheckpointError when `out` exists and when the checkpoint is incomplete.
    """
    with ExitStack() as stack:
        with ranks.together():
            directory = find_checkpoint(checkpoint, model)
            manifest.check_manifest(directory)
            config = load_model_config(directory)
            stored = TorchDistCheckpoint(directory)
            score_head = _has_score_head(stored)
            source = CheckpointSource(stored, config, score_head=score_head)
            stack.callback(source.io.close)
            plan = plan_hf(source, config, score_head=score_head, max_shard_bytes=max_shard_bytes)

        def finish(content: Path) -> None:
            copy_assets(hf_assets_directory(directory), content, dtype=source.dtype)
            plan.write_index(content)

        _convert(source, plan.files, out, {"to": "hf"}, finish, ranks)
    if not quiet and ranks.rank == 0:
        print(_summary(out, config, source, plan.files, score_head))


def write_checkpoint(
    source: Source,
    config: dict[str, Any],
    assets: Path,
    out: Path,
    *,
    score_head: bool,
    ranks: Ranks,
    options: dict[str, Any] | None = None,
    max_bytes: int | None = None,
    quiet: bool = True,
) -> None:
    """A checkpoint from any source of parameters. `options` tell it from another conversion of the same files."""
    with ranks.together():
        plan = plan_checkpoint(source, config, score_head=score_head, max_shard_bytes=max_bytes)
    inside = Path(DISCRIMINATOR) if score_head and out.name != DISCRIMINATOR else Path()

    def finish(content: Path) -> None:
        directory = content / inside
        plan.write_index(directory)
        copy_assets(assets, directory / "hf", config=config, dtype=source.dtype)
        manifest.seal(directory)

    _convert(source, plan.files, out, {"to": "torch_dist", **(options or {})}, finish, ranks, inside)
    if not quiet and ranks.rank == 0:
        print(_summary(out / inside, config, source, plan.files, score_head))


def _convert(
    source: Source,
    files: Sequence[TargetFile],
    out: Path,
    options: dict[str, Any],
    finish: Callable[[Path], None],
    ranks: Ranks,
    inside: Path = Path(),
) -> None:
    """Writes the files into `out`/`inside`; `finish` adds what goes along. The first rank gives `out` its name."""
    read = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files}
    what = {
        "version": _PLAN_VERSION,
        "read": read,
        "write": [[str(inside / file.name), file.size, len(file.slots)] for file in files],
    }
    staging = Staging(out, {**what, **options}, ranks, inside)
    with staging.open() as needed:
        if not needed:
            return
        staging.write(files, source.io)
        with ranks.together():
            if ranks.rank == 0:
                finish(staging.content)
                staging.publish()


def find_checkpoint(path: Path, model: str | None = None) -> Path:
    """The folder of a model's checkpoint in a run, a step, or the folder itself; CheckpointError when there is none."""
    for name in (model,) if model else (POLICY, DISCRIMINATOR):
        directory = resolve_model_directory(path, name)
        if (directory / METADATA).is_file() or (directory / manifest.MANIFEST).is_file():
            return directory
    raise CheckpointError("there is no checkpoint", where=str(path), remedy="give a run, a step or a model's folder")


def headless(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a discriminator: it has no output matrix, and says so by tying it to the embedding."""
    return {**config, "tie_word_embeddings": True, "text_config": {**config["text_config"], "tie_word_embeddings": True}}


def _has_score_head(checkpoint: TorchDistCheckpoint) -> bool:
    return f"{find_wrapper(checkpoint.tensors) or ''}{MEGATRON_SCORE_HEAD}" in checkpoint.tensors


def _summary(out: Path, config: dict[str, Any], source: Source, files: Sequence[TargetFile], score_head: bool) -> str:
    parameters = sum(prod(shape) for shape in hf_shapes(config, score_head=score_head).values())
    kind = "discriminator" if score_head else "policy"
    size = sum(file.size for file in files) / 1e9
    count = f"{len(files)} file{'s'[: len(files) != 1]}"
    return f"{out}: {kind}, {parameters:,} parameters in {source.dtype}, {size:.2f} GB in {count}"
