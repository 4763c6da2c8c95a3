"""Prompt and pictures -> tokens and patches, response -> tokens, tokens -> text: Qwen3-VL's chat form, one way for every stage.

A prompt is a system turn that asks for the response format, a user turn with each image and video at its `<image>` or `<video>`
placeholder, and the opening of the assistant's turn, as the model's own chat template writes them. A response, and a
discriminator's segment alike, is its text's tokens and the end-of-turn token. Text can never become a special token, and nothing
is ever cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.images import load_image
from prism_nemo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, ImageSource, Record, VideoSource
from prism_nemo.data.video import CONFIG_FILE, VideoProcessor
from prism_nemo.data.video_frames import open_video
from prism_nemo.data.visuals import (
    IMAGE_PAD,
    MAX_ASPECT_RATIO,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VisualBlock,
    expand_pads,
    image_block,
)
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.packing.groups import EncodedPrompt, text_prompt
from prism_nemo.packing.positions import mrope_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

DEFAULT_SYSTEM_PROMPT = (
    "Answer in exactly this format, with nothing outside the tags:\n"
    "<caption> what the image shows, as far as the question needs it </caption> "
    "<think> the reasoning, step by step </think> "
    "<answer> the final answer alone </answer>"
)
END_OF_TURN = "<|im_end|>"
GENERATION_PROMPT = "<|im_start|>assistant\n"
_PLACEHOLDERS = re.compile(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})")
_MARKERS = re.compile("|".join(map(re.escape, (VIDEO_PAD, VISION_START, VISION_END))))
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


class ChatEncoder:
    """Encodes records for one model.

    model_config is the parsed `config.json` of a Qwen3-VL; the tokenizer and the image processor are its own, and video_config is
    its parsed `video_preprocessor_config.json`, without which there can be no videos. Image and video paths are taken below
    the record's own image root, or `image_root`; None allows only records without files. Raises ConfigError when they do not fit
    together.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_processor: Qwen2VLImageProcessorPil,
        model_config: Mapping[str, Any],
        data: DataConfig,
        *,
        image_root: Path | None,
        video_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.data = data
        self.image_root = image_root
        vision = _section(
            model_config, "vision_config", ("in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size")
        )
        self.spatial_merge_size = vision["spatial_merge_size"]
        self.patch_size = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2  # of a patch vector
        text = _section(model_config, "text_config", ("vocab_size",))
        self.vocab_size = text["vocab_size"]  # the model's, which may exceed the tokenizer's
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.image_token_id = self._model_token(model_config, "image_token_id", IMAGE_PAD)
        self.video_token_id = self._model_token(model_config, "video_token_id", VIDEO_PAD)
        self.vision_start_token_id = self._model_token(model_config, "vision_start_token_id", VISION_START)
        self.vision_end_token_id = self._model_token(model_config, "vision_end_token_id", VISION_END)
        self.end_token_id = self._token_id(END_OF_TURN)
        if tokenizer.pad_token_id is None:
            raise ConfigError(
                "the tokenizer has no padding token", where="tokenizer_config.json", remedy="Qwen3-VL's is <|endoftext|>"
            )
        self.pad_token_id: int = tokenizer.pad_token_id
        added = tokenizer.added_tokens_decoder
        self._special_ids = {index for index in added if added[index].special} | set(tokenizer.all_special_ids)
        self.banned_token_ids = self._find_banned()
        self._image_size = self._find_image_size(vision)
        self._video_processor = None if video_config is None else VideoProcessor.from_config(video_config, vision, data)
        self._system_prompt = DEFAULT_SYSTEM_PROMPT if data.system_prompt is None else data.system_prompt
        self._check_template()

    @classmethod
    def from_directory(cls, path: Path, data: DataConfig, *, image_root: Path | None) -> ChatEncoder:
        """The encoder of a HuggingFace model directory, or of a checkpoint directory that carries one as `hf/`.

        Without an `image_root`: `data.image_root`, otherwise the folder of the data file, as the readers do.
        Raises ConfigError when the directory or one of its files is missing or unreadable. Runs no code from the directory.
        """
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        directory = hf_directory(path)
        try:
            model_config = json.loads((directory / "config.json").read_bytes())
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory, local_files_only=True)
            video_file = directory / CONFIG_FILE
            video_config = json.loads(video_file.read_bytes()) if video_file.is_file() else None
        except Exception as error:  # a damaged tokenizer.json raises a bare Exception
            raise ConfigError(
                f"the tokenizer or image processor cannot be loaded: {error}",
                where=str(directory),
                remedy="restore the model's files",
            ) from error
        if image_root is None:
            file = data.train or data.validation
            image_root = Path(data.image_root) if data.image_root else Path(file).parent if file else None
        return cls(tokenizer, image_processor, model_config, data, image_root=image_root, video_config=video_config)

    def encode_prompt(self, record: Record) -> EncodedPrompt:
        """The record's prompt up to the opening of the assistant's turn.

        Raises DataError, naming the record, for an unusable image or video, text that holds special tokens or words the tokenizer
        does not know, and a prompt longer than `data.max_prompt_length`; ConfigError where videos need what is not there.
        """
        try:
            prompt = self._encode_prompt(record)
            if len(prompt) > self.data.max_prompt_length:
                visual_tokens, limit = int(prompt.image_mask.sum()), self.data.max_prompt_length
                smaller = "data.video_max_pixels or data.video_fps" if record.videos else "data.image_max_pixels"
                raise DataError(
                    f"the prompt has {len(prompt)} tokens ({visual_tokens} of them visual), the limit is {limit}",
                    remedy=f"raise data.max_prompt_length, or lower {smaller}",
                )
        except DataError as error:
            where = f"record {record.id}" + (f", {error.where}" if error.where else "")
            raise DataError(error.what, where=where, remedy=error.remedy) from error
        return prompt

    def encode_response(self, text: str) -> Tensor:
        """Tokens of a response and the end-of-turn token, int64 [length].

        Raises DataError for special tokens or unknown words in the text, and for more than `data.max_response_length` tokens.
        """
        tokens = [*self._tokenize(text), self.end_token_id]
        if len(tokens) > self.data.max_response_length:
            raise DataError(
                f"the response has {len(tokens)} tokens, the limit is {self.data.max_response_length}",
                remedy="raise data.max_response_length; a response is never cut",
            )
        return torch.tensor(tokens, dtype=torch.int64)

    def encode_segment(self, text: str) -> Tensor:
        """Tokens of a discriminator's segment, int64 [length]: teacher and student alike, closed by the token it is scored at."""
        return self.encode_response(text)

    def decode(self, token_ids: Tensor | Sequence[int]) -> str:
        """The text of a response's tokens, up to its end-of-turn token; special tokens that should not be there stay visible."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        if self.end_token_id in ids:
            ids = ids[: ids.index(self.end_token_id)]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _encode_prompt(self, record: Record) -> EncodedPrompt:
        content: list[dict[str, str]] = []
        counts = {"image": 0, "video": 0}
        for part in _PLACEHOLDERS.split(record.prompt):
            if _PLACEHOLDERS.fullmatch(part):
                kind = part.strip("<>")
                counts[kind] += 1
                content.append({"type": kind})
            elif part:
                self._tokenize(part)  # refuses what must not be in a user's text
                content.append({"type": "text", "text": part})
        for kind, given in (("image", len(record.images)), ("video", len(record.videos))):
            if counts[kind] != given:
                raise DataError(f"the prompt has {counts[kind]} <{kind}> placeholders for {given} {kind}s")
        text = self._render(content)
        blocks = self._blocks(record, [part["type"] for part in content if part["type"] in counts])
        text = expand_pads(text, blocks)
        input_ids = torch.tensor(self._ids(text), dtype=torch.int64)
        if not blocks:
            return text_prompt(input_ids, self.patch_size)
        image_mask = (input_ids == self.image_token_id) | (input_ids == self.video_token_id)
        grid = torch.cat([block.grid for block in blocks])
        return EncodedPrompt(
            input_ids=input_ids,
            position_ids=mrope_positions(input_ids, image_mask, grid, spatial_merge_size=self.spatial_merge_size),
            image_mask=image_mask,
            pixel_values=torch.cat([block.pixel_values for block in blocks]),
            image_grid_thw=grid,
        )

    def _blocks(self, record: Record, kinds: Sequence[str]) -> list[VisualBlock]:
        """The record's images and videos in the order of their placeholders.

        One is made after the other, and none behind the limit of a prompt: records may name many, of few bytes and many pixels.
        """
        root, limit = record.image_root or self.image_root, self.data.max_prompt_length
        images, videos = iter(record.images), iter(record.videos)
        blocks: list[VisualBlock] = []
        tokens = 0
        for kind in kinds:
            block = self._image_block(next(images), root) if kind == "image" else self._video_block(next(videos), root)
            tokens += int(block.grid.prod(dim=-1).sum()) // self.spatial_merge_size**2
            if tokens > limit:
                raise DataError(
                    f"the first {len(blocks) + 1} of {len(kinds)} images and videos have {tokens} visual tokens, "
                    f"the limit of a prompt is {limit}",
                    remedy="raise data.max_prompt_length, or lower data.image_max_pixels or data.video_max_pixels",
                )
            blocks.append(block)
        return blocks

    def _video_block(self, source: VideoSource, root: Path | None) -> VisualBlock:
        if self._video_processor is None:
            raise ConfigError(
                f"the model directory has no {CONFIG_FILE}, which videos need", remedy="copy it from the HuggingFace model"
            )
        block = self._video_processor(open_video(source, root))
        self._tokenize(_MARKERS.sub(" ", block.text))  # refuses timestamps where the vocabulary has no words for them
        return block

    def _render(self, content: list[dict[str, str]]) -> str:
        messages = [{"role": "system", "content": self._system_prompt}, {"role": "user", "content": content}]
        try:
            return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates are programs, in a sandbox, and fail in any way
            raise ConfigError(
                f"the chat template cannot be used: {error}",
                where="chat_template.jinja",
                remedy="copy it from the Qwen3-VL model",
            ) from error

    def _image_block(self, source: ImageSource, root: Path | None) -> VisualBlock:
        image = load_image(source, root)
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise DataError(
                f"the image is {image.width} x {image.height} pixels, more than {MAX_ASPECT_RATIO} times as long as wide"
            )
        features = self.image_processor(images=[image], size=self._image_size, return_tensors="pt")
        grid = features["image_grid_thw"].to(torch.int64)
        return image_block(features["pixel_values"].to(torch.float32), grid, merge_size=self.spatial_merge_size)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokenize(self, text: str) -> list[int]:
        """Tokens of text that people or models wrote: no special token may come of it, and no word may be unknown."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        for index, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
            if index in self._special_ids:
                if index == self.tokenizer.unk_token_id:
                    raise DataError(
                        f"the tokenizer does not know {text[start:end]!r}", remedy="use the words of the model's vocabulary"
                    )
                raise DataError(
                    f"the text holds the special token {text[start:end]!r}", remedy="remove it: such a token is not text"
                )
        return ids

    def _token_id(self, token: str) -> int:
        index = self._vocabulary.get(token)
        if index is None:
            raise ConfigError(
                f"the tokenizer has no token {token}", remedy="use the tokenizer that comes with the Qwen3-VL model"
            )
        return index

    def _model_token(self, model_config: Mapping[str, Any], key: str, token: str) -> int:
        index = self._token_id(token)
        if model_config.get(key) != index:
            raise ConfigError(
                f"the model's {key} is {model_config.get(key)}, the tokenizer's {token} is {index}",
                where="config.json",
                remedy="use the tokenizer that comes with the model",
            )
        return index

    def _find_banned(self) -> tuple[int, ...]:
        """Tokens that must never be sampled: special ones other than the end of turn, and embedding rows without a token."""
        known = set(self._vocabulary.values())
        if max(known) >= self.vocab_size:
            raise ConfigError(
                f"the tokenizer has tokens up to {max(known)}, the model's embedding {self.vocab_size} rows",
                where="config.json",
                remedy="use the tokenizer that comes with the model",
            )
        return tuple(sorted(((set(range(self.vocab_size)) - known) | self._special_ids) - {self.end_token_id}))

    def _find_image_size(self, vision: Mapping[str, int]) -> dict[str, int]:
        """The processor's bounds on an image's pixels, or the configured ones."""
        processor = self.image_processor
        for name, own, models in (
            ("patch_size", processor.patch_size, vision["patch_size"]),
            ("merge_size", processor.merge_size, vision["spatial_merge_size"]),
            ("temporal_patch_size", processor.temporal_patch_size, vision["temporal_patch_size"]),
        ):
            if own != models:
                raise ConfigError(
                    f"the image processor's {name} is {own}, the model's is {models}",
                    where="preprocessor_config.json",
                    remedy="use the image processor that comes with the model",
                )
        least = processor.size["shortest_edge"] if self.data.image_min_pixels is None else self.data.image_min_pixels
        most = processor.size["longest_edge"] if self.data.image_max_pixels is None else self.data.image_max_pixels
        token = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
        if not 0 < least <= most or most < token:
            raise ConfigError(
                f"an image cannot have between {least} and {most} pixels",
                where="data.image_min_pixels, data.image_max_pixels",
                remedy=f"the least at most the most, and room for one image token of {token} pixels",
            )
        return {"shortest_edge": least, "longest_edge": most}

    def _check_template(self) -> None:
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "the tokenizer has no chat template", where="chat_template.jinja", remedy="copy it from the Qwen3-VL model"
            )
        try:
            self._tokenize(self._system_prompt)
        except DataError as error:
            raise ConfigError(
                f"the system prompt cannot be used: {error.what}", where="data.system_prompt", remedy=error.remedy
            ) from error
        rendered = self._render([{"type": "image"}])
        if not rendered.endswith(GENERATION_PROMPT):
            raise ConfigError(
                f"the chat template opens the assistant's turn with {rendered[-40:]!r}",
                where="chat_template.jinja",
                remedy=f"use the template of an Instruct model, which opens it with {GENERATION_PROMPT!r}: <caption> comes first",
            )


def hf_directory(path: Path) -> Path:
    """The HuggingFace directory at `path`, or below it as `hf/` in a checkpoint. Raises ConfigError where there is none."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError("the model directory does not exist", where=str(path), remedy="check model.path")
    directory = path / "hf" if (path / "hf").is_dir() else path
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        raise ConfigError(
            f"the model directory has no {', '.join(missing)}",
            where=str(directory),
            remedy="copy them from the HuggingFace model",
        )
    return directory


def _section(model_config: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> dict[str, int]:
    section = model_config.get(name) or {}
    missing = [key for key in keys if not isinstance(section.get(key), int)]
    if missing:
        raise ConfigError(
            f"the model's {name} has no {', '.join(missing)}", where="config.json", remedy="model.path must be a Qwen3-VL"
        )
    return {key: section[key] for key in keys}
