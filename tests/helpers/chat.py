"""A byte-level tokenizer, an image processor and a configuration as Qwen3-VL's, and pictures for the chat encoder."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism_nemo.data.chat import DEFAULT_SYSTEM_PROMPT
from prism_nemo.data.digits_model import build_tokenizer
from prism_nemo.data.records import ImageSource

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
RESPONSE = "<caption> deux assiettes, 3 œufs </caption> <think> 2+1=3 </think> <answer> 3 </answer>"


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As Qwen's: byte-level BPE, special tokens beyond the vocabulary, `<think>` an ordinary added token."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [DEFAULT_SYSTEM_PROMPT, RESPONSE, "How many eggs are on the plates?"], vocab_size=320, show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=build_tokenizer().chat_template,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def image_processor(**size: int) -> Qwen2VLImageProcessorPil:
    bounds = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256} | size
    return Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=bounds, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def model_config(tokenizer: PreTrainedTokenizerFast, *, spare_rows: int = 5) -> dict[str, Any]:
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokens |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in tokens.items()},
        "text_config": {"vocab_size": len(tokenizer) + spare_rows},
        "vision_config": {"in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }


def picture(width: int, height: int, seed: int = 0) -> ImageSource:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values.numpy()).save(buffer, "PNG")
    return ImageSource(data=buffer.getvalue())


class ImageOnlyProcessor(Qwen3VLProcessor):
    """transformers' processor without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
        return type(argument)
