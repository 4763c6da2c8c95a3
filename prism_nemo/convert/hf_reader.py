"""The weights of a HuggingFace directory by the Hub's names, whoever wrote it; read where they lie, without mapping files.

Understood besides the Hub's own form: models saved without their language-model head (no outer prefix), transformers 5's and
per-expert tensors, and the names and files under which discriminators keep their scalar head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prism_nemo.convert.dtypes import BY_CODE, DType, dtype_of
from prism_nemo.convert.files import StoredWeight, check_index, read_weights_header, shortened, weight_files
from prism_nemo.convert.pieces import Computed, Files, Piece, Run, Runs, byte_chunks, read_tensor
from prism_nemo.convert.qwen3_vl import HF_SCORE_HEAD, Config, ExpertLayout, Shape, hf_shapes, hub_config, is_moe_layer
from prism_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_BARE_PREFIXES = ("language_model.", "visual.")  # as transformers saves the model without its language-model head
_EMBEDDING, _OUTPUT = "model.language_model.embed_tokens.weight", "lm_head.weight"
_HEAD = re.compile(r"^(?:model\.|module\.)?(?:v_head|value_head|score|score_head)(?:\.summary)?\.(weight|bias)$")
_HEAD_FILES = re.compile(r"^(?:v_head|value_head|score|score_head)\.(pt|pth|bin|safetensors)$")
_SEPARATE = re.compile(r"\.mlp\.experts\.\d+\.(?:gate|up|down)_proj\.weight$")


@dataclass(frozen=True, eq=False)
class _InMemory:
    """A head from a file of its own."""

    tensor: Tensor


class HFReader:
    """The weights of a HuggingFace directory: one file, or several with an index. Reads lazily.

    Raises CheckpointError when there are no weights, when a file is missing, cut short or not safetensors, or when the index and
    the files disagree. Tensors come as they are stored, on the CPU. A discriminator's head is `HF_SCORE_HEAD`, [1, hidden],
    whatever its name and file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weight_files = weight_files(directory)
        self.io = Files()
        self._entries: dict[str, StoredWeight | _InMemory] = {}
        stored_names: list[str] = []
        for path in self.weight_files:
            for stored, entry in read_weights_header(path).items():
                stored_names.append(stored)
                self._add(f"model.{stored}" if stored.startswith(_BARE_PREFIXES) else stored, entry, path)
        check_index(directory, stored_names)
        for path in sorted(directory.iterdir()):
            if _HEAD_FILES.match(path.name):
                self._add_head_file(path)

    def _add(self, name: str, entry: StoredWeight | _InMemory, path: Path) -> None:
        head = _HEAD.match(name)
        if head is not None and head[1] == "bias":
            bias = self._read(entry)
            if bias.count_nonzero():
                raise CheckpointError(
                    f"the scalar head has a bias (`{name}`), which this project's does not have",
                    where=str(path),
                    remedy="a head without one; only the differences of scores matter, so setting it to zero is safe",
                )
            return
        name = HF_SCORE_HEAD if head is not None else name
        if name in self._entries:
            raise CheckpointError(f"`{name}` is stored twice", where=str(path), remedy="a complete, fresh copy")
        self._entries[name] = entry

    def _add_head_file(self, path: Path) -> None:
        for name, tensor in _load_head(path).items():
            if name == "weight" and HF_SCORE_HEAD in self._entries:
                if not self.get(HF_SCORE_HEAD).flatten().equal(tensor.flatten()):
                    raise CheckpointError("the scalar head is stored twice, differently", where=str(path), remedy="remove one")
                continue
            self._add(f"value_head.{name}", _InMemory(tensor), path)

    @property
    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> Shape:
        entry = self._entries[name]
        shape = entry.shape if isinstance(entry, StoredWeight) else tuple(entry.tensor.shape)
        return (1, *shape) if name == HF_SCORE_HEAD and len(shape) == 1 else shape

    def dtype(self, name: str) -> DType:
        entry = self._entries[name]
        if not isinstance(entry, StoredWeight):
            return dtype_of(entry.tensor.dtype)
        if entry.dtype not in BY_CODE:
            raise CheckpointError(f"`{name}` is stored as {entry.dtype}", where=str(self.directory))
        return BY_CODE[entry.dtype]

    def pieces(self, name: str, first: int, last: int, *, expert: int | None = None) -> list[Piece]:
        """Rows `first` to `last` (exclusive) of the tensor, or of one expert's matrix in a fused one."""
        shape, itemsize = self.shape(name), self.dtype(name).itemsize
        if expert is not None:
            first, last = expert * shape[1] + first, expert * shape[1] + last
            shape = (shape[0] * shape[1], *shape[2:])
        row_bytes = prod(shape[1:]) * itemsize
        entry = self._entries[name]
        if isinstance(entry, StoredWeight):
            return [Runs((Run(entry, first * row_bytes, (last - first) * row_bytes),))]
        return [Computed((last - first) * row_bytes, lambda: entry.tensor.reshape(shape)[first:last])]

    def get(self, name: str) -> Tensor:
        """The whole tensor."""
        return self._read(self._entries[name]).reshape(self.shape(name))

    def get_slice(self, name: str, index: int) -> Tensor:
        """`get(name)[index]`, reading no more than that."""
        pieces = self.pieces(name, index, index + 1)
        return read_tensor(pieces, self.io, self.shape(name)[1:], self.dtype(name))

    def _read(self, entry: StoredWeight | _InMemory) -> Tensor:
        if isinstance(entry, _InMemory):
            return entry.tensor
        dtype = BY_CODE[entry.dtype]
        whole = Runs((Run(entry, 0, prod(entry.shape) * dtype.itemsize),))
        return read_tensor([whole], self.io, entry.shape, dtype)

    def expert_layout(self, config: Config) -> ExpertLayout:
        """How the experts are laid out, by the names or shapes of one layer's tensors; CheckpointError when they fit no layout.

        One fused matrix alone can be square and tell nothing; both never are (hidden = 2 x width and hidden = width), so that the
        pair always tells, whatever version config.json names. A model without experts has the Hub's layout.
        """
        config = hub_config(config)
        layers = (layer for layer in range(config["text_config"]["num_hidden_layers"]) if is_moe_layer(config, layer))
        layer = next(layers, None)
        if layer is None:
            return ExpertLayout.hub
        if any(_SEPARATE.search(name) for name in self._entries):
            return ExpertLayout.separate
        names = [f"model.language_model.layers.{layer}.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
        if not set(names) <= self.names:
            return ExpertLayout.hub  # `check` lists what is missing
        found = [self.shape(name) for name in names]
        for layout in (ExpertLayout.hub, ExpertLayout.transformers5):
            expected = hf_shapes(config, layout)
            if found == [expected[name] for name in names]:
                return layout
        raise CheckpointError(
            f"experts with gate_up_proj {list(found[0])} and down_proj {list(found[1])} have neither of the two known layouts",
            where=f"{self.directory}: language layer {layer}",
            remedy="weights that belong to this config.json, all experts written by one tool",
        )

    def check(self, config: Config, *, score_head: bool = False) -> ExpertLayout:
        """Hold the directory to the model's declaration and return its expert layout; CheckpointError lists what does not fit.

        A discriminator has no use for an output matrix; it may be stored all the same.
        """
        layout = self.expert_layout(config)
        expected = hf_shapes(config, layout, score_head=score_head)
        found = self.names
        if {_OUTPUT, _EMBEDDING} <= found and _OUTPUT not in expected:
            if not score_head:
                self._check_tied()
            found.discard(_OUTPUT)
        problems = [
            *(f"missing: {name}" for name in sorted(expected.keys() - found)),
            *(f"unexpected: {name}" for name in sorted(found - expected.keys())),
            *(
                f"{name}: shape {list(self.shape(name))}, expected {list(shape)}"
                for name, shape in expected.items()
                if name in found and self.shape(name) != shape
            ),
        ]
        if problems:
            raise CheckpointError(
                f"the weights do not fit config.json ({len(problems)} problems):\n  " + shortened(problems),
                where=str(self.directory),
                remedy=_remedy(expected.keys() - found, found - expected.keys()),
            )
        return layout

    def _check_tied(self) -> None:
        """Some tools store the output matrix of a tied model as well. It must then be the embedding."""
        rows, hidden = self.shape(_EMBEDDING)
        same = self.shape(_OUTPUT) == (rows, hidden) and self.dtype(_OUTPUT) == self.dtype(_EMBEDDING)
        step = max(1, (1 << 20) // (hidden * 8))  # a megabyte at a time
        for first in range(0, rows if same else 0, step):
            pieces = (self.pieces(name, first, min(first + step, rows)) for name in (_OUTPUT, _EMBEDDING))
            one, other = (b"".join(bytes(chunk) for chunk in byte_chunks(rows_of, self.io)) for rows_of in pieces)
            if one != other:
                same = False
                break
        if not same:
            raise CheckpointError(
                "config.json ties the embeddings, but the weights have an output matrix of their own",
                where=f"{self.directory}: {_OUTPUT}",
                remedy='"tie_word_embeddings": false in config.json, if the matrix is meant',
            )

    def close(self) -> None:
        self.io.close()

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def has_score_head(reader: HFReader) -> bool:
    """Whether the directory holds a discriminator."""
    return HF_SCORE_HEAD in reader.names


def _load_head(path: Path) -> dict[str, Tensor]:
    """`weight`, and `bias` where there is one, of a file that holds a scalar head alone. Nothing but tensors is unpickled."""
    import torch

    from prism_nemo.convert.vetting import load_plain

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = load_plain(path)
    except Exception as error:  # foreign bytes raise anything
        raise CheckpointError(
            f"the scalar head's file cannot be read safely: {error}", where=str(path), remedy="save its state_dict, tensors alone"
        ) from error
    content = {"weight": content} if isinstance(content, torch.Tensor) else content
    found: dict[str, Tensor] = {}
    for name, tensor in content.items() if isinstance(content, dict) else ():
        kind = str(name).rpartition(".")[2]
        if not isinstance(tensor, torch.Tensor) or kind not in ("weight", "bias") or kind in found:
            raise CheckpointError(f"`{name}` is not what a scalar head has", where=str(path), remedy="one weight, and no more")
        found[kind] = tensor
    if "weight" not in found or found["weight"].dim() > 2:
        raise CheckpointError("there is no scalar head in the file", where=str(path), remedy="a weight of [1, hidden]")
    return found


def _remedy(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    if _OUTPUT in missing:
        return '"tie_word_embeddings": true in config.json, if the model has no output matrix of its own'
    if HF_SCORE_HEAD in unexpected:
        return "the directory holds a discriminator; give the policy's"
    return "the config.json that belongs to these weights; quantised weights are not supported"
