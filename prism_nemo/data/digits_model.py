"""The digits task's model: a word-level tokenizer with Qwen's special tokens and a small Qwen3-VL, as a HuggingFace directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_nemo.data.digits_text import MAX_NUMBER, TAGS, WORDS
from prism_nemo.data.files import new_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PATCH = 16  # pixels
MERGE = 2  # patches: a digit of 32 x 32 pixels is one merged visual token
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_UNKNOWN = "<|unknown|>"  # what a word outside the vocabulary becomes: the encoder refuses such text
_ROLES = ("system", "user", "assistant")
_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_README = """\
# A small Qwen3-VL for the digits task

About 1.2 million parameters and a vocabulary of whole words, with freshly drawn weights: the starting point of the
prism-nemo demo. It is a `Qwen3VLForConditionalGeneration` that transformers loads, and knows nothing before SFT.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words between white space are tokens; special tokens and chat template in Qwen's form. 64 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL, _UNKNOWN, *TAGS, *_ROLES, *map(str, range(MAX_NUMBER + 1)), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in _SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def write_base_model(out: Path, *, seed: int) -> None:
    """Write the untrained model: configuration, tokenizer, processors and weights drawn from `seed`.

    Raises DataError when `out` exists and is not empty; an interrupted run leaves nothing at `out`.
    """
    from prism_nemo.convert.random_init import write_random_weights

    with new_directory(out) as directory:
        write_model_files(directory)
        write_random_weights(directory, seed=seed)


def write_model_files(directory: Path) -> None:
    """Everything of the model's directory but the weights."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    _write_json(directory / "config.json", _model_config(ids, vocab_size=-(-len(tokenizer) // 8) * 8))
    _write_json(
        directory / "generation_config.json",
        {
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "temperature": 1.0,
        },
    )
    _write_json(directory / "preprocessor_config.json", _processor_config() | {"image_processor_type": "Qwen2VLImageProcessor"})
    _write_json(
        directory / "video_preprocessor_config.json", _processor_config() | {"video_processor_type": "Qwen3VLVideoProcessor"}
    )
    (directory / "README.md").write_text(_README, encoding="utf-8")


def _model_config(ids: dict[str, int], *, vocab_size: int) -> dict[str, Any]:
    """In the Hub's form, which transformers 4 and 5 and vLLM read."""
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "dtype": "float32",
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 256,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.02,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def _processor_config() -> dict[str, Any]:
    token = (PATCH * MERGE) ** 2  # pixels of one merged token: images down to it, and strips of digits, keep their size
    return {
        "size": {"shortest_edge": token, "longest_edge": 64 * token},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
