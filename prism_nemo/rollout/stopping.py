"""Texts that end a response, such as `</answer>`, whatever tokens they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


class Tokenizer:
    """A model directory's tokenizer, loaded when it is needed first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._directory, local_files_only=True, trust_remote_code=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """With special tokens as they are written: they are part of what a response may stop at."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class TextStops:
    """Looks at the end of responses while they grow. Every token is a byte of text at least, so that few need to be read."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._texts = tuple(texts)
        self._decode = decode
        self._window = max((len(text.encode()) for text in texts), default=0)

    def ended(self, tokens: Tensor) -> np.ndarray:
        """Of responses int64 [B, length] so far, bool [B]: those whose last token has completed one of the texts."""
        if not self._texts:
            return np.zeros(len(tokens), dtype=bool)
        tails = (self._decode(row) for row in tokens[:, -self._window :].tolist())
        return np.array([any(text in tail for text in self._texts) for tail in tails], dtype=bool)
