"""Prompts with videos: tokens and patches against transformers' own Qwen3-VL processor, and everything that must be refused."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.chat import SPECIAL, ImageOnlyProcessor, byte_level_tokenizer, image_processor, model_config, picture
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLModel
from transformers.video_utils import VideoMetadata

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.chat import DEFAULT_SYSTEM_PROMPT, ChatEncoder
from prism_nemo.data.digits_model import build_tokenizer, write_model_files
from prism_nemo.data.digits_text import SYSTEM_PROMPT
from prism_nemo.data.records import ImageSource, Record, VideoSource
from prism_nemo.errors import ConfigError, DataError

VIDEO_CONFIG = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
    return build(tokenizer)


def build(tokenizer: PreTrainedTokenizerFast, **options: Any) -> ChatEncoder:
    data = DataConfig(max_prompt_length=4096, **options.pop("data", {}))
    arguments = {"image_root": None, "video_config": VIDEO_CONFIG} | options
    return ChatEncoder(tokenizer, image_processor(), model_config(tokenizer), data, **arguments)


def clip(width: int, height: int, frames: int, *, fps: float | None = None, timestamps: tuple[float, ...] | None = None) -> Any:
    return VideoSource(
        frames=tuple(picture(width, height, 100 + number) for number in range(frames)), fps=fps, timestamps=timestamps
    )


RECORDS = {
    "one video": Record("v", "<video>\nHow many eggs?", videos=(clip(64, 64, 8, fps=4.0),)),
    "odd frames, odd size": Record("o", "in <video>?", videos=(clip(50, 90, 5, fps=2.0),)),
    "images around videos": Record(
        "m",
        "from <image> over <video> and <video>, not <image>",
        (picture(64, 64), picture(33, 190, 1)),
        videos=(clip(96, 32, 4, fps=1.0), clip(64, 64, 30, fps=7.5)),
    ),
    "timestamps": Record(
        "t", "<video> eggs <image>", (picture(32, 32),), videos=(clip(32, 64, 3, timestamps=(0.5, 2.0, 61.26)),)
    ),
}


class StandIn:
    """Gives our patches in the form of transformers' video processor, which needs torchvision, and the frames' true times.

    (Its pieces are held against ours in test_data_video.py. What is compared here is what the whole processor makes of them.)
    """

    merge_size = temporal_patch_size = 2

    def __init__(self, encoder: ChatEncoder, record: Record) -> None:
        self.features: dict[str, Any] = {"pixel_values_videos": [], "video_grid_thw": [], "video_metadata": []}
        for source in record.videos:
            prompt = encoder.encode_prompt(Record("x", "<video>", videos=(source,)))
            self.features["pixel_values_videos"].append(prompt.pixel_values)
            times, (_, *grid) = len(prompt.image_grid_thw), prompt.image_grid_thw[0].tolist()
            self.features["video_grid_thw"].append(torch.tensor([times, *grid]))
            count, fps = len(source.frames), source.fps
            if source.timestamps is not None:  # transformers divides indices by the rate
                indices, fps = list(source.timestamps), 1.0
            else:
                seen = min(max(int(count / (fps or 0.0) * 2.0), 4), count)
                indices = np.linspace(0, count - 1, seen).round().astype(int).tolist()
            self.features["video_metadata"].append(VideoMetadata(total_num_frames=count, fps=fps, frames_indices=indices))

    def __call__(self, videos: object, **options: object) -> BatchFeature:
        pixels, grids = torch.cat(self.features["pixel_values_videos"]), torch.stack(self.features["video_grid_thw"])
        return BatchFeature({**self.features, "pixel_values_videos": pixels, "video_grid_thw": grids})


def transformers_prompt(encoder: ChatEncoder, record: Record, video_processor: Any = None) -> BatchFeature:
    user = record.prompt.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    user = user.replace("<video>", "<|vision_start|><|video_pad|><|vision_end|>")
    text = f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    video_processor = video_processor or StandIn(encoder, record)
    processor = ImageOnlyProcessor(
        image_processor=image_processor(), tokenizer=encoder.tokenizer, video_processor=video_processor
    )
    videos = [np.stack([np.asarray(opened(frame)) for frame in source.frames]) for source in record.videos]
    metadata = [VideoMetadata(total_num_frames=len(source.frames), fps=source.fps) for source in record.videos]
    images = [opened(source) for source in record.images]
    return processor(text=[text], images=images or None, videos=videos, video_metadata=metadata, return_tensors="pt")


def opened(source: ImageSource) -> Image.Image:
    return Image.open(io.BytesIO(source.data or b""))


@pytest.mark.parametrize("name", RECORDS)
def test_prompts_equal_transformers(encoder: ChatEncoder, name: str) -> None:
    record = RECORDS[name]
    expected = transformers_prompt(encoder, record)
    prompt = encoder.encode_prompt(record)
    assert torch.equal(prompt.input_ids, expected["input_ids"][0])
    kinds = expected["mm_token_type_ids"][0]
    assert torch.equal(prompt.image_mask, kinds > 0)

    patches = prompt.pixel_values.split(prompt.image_grid_thw.prod(dim=1).tolist())
    merged = (prompt.image_grid_thw.prod(dim=1) // 4).tolist()
    of_block = [int(block[0]) for block in kinds[prompt.image_mask].split(merged)]
    for kind, pixels, grid in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        own = [index for index, found in enumerate(of_block) if found == kind]
        if own:
            assert torch.equal(torch.cat([patches[index] for index in own]), expected[pixels])
            split = [[1, height, width] for time, height, width in expected[grid].tolist() for _ in range(time)]
            assert prompt.image_grid_thw[own].tolist() == split


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "timestamps"])
def test_prompts_equal_the_whole_processor(encoder: ChatEncoder, name: str) -> None:
    """Bit by bit, where torchvision is installed, without which transformers processes no video."""
    pytest.importorskip("torchvision")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    record = RECORDS[name]
    whole = Qwen3VLVideoProcessor(**VIDEO_CONFIG, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    expected = transformers_prompt(encoder, record, whole)
    prompt = encoder.encode_prompt(record)
    assert torch.equal(prompt.input_ids, expected["input_ids"][0])
    videos = (prompt.input_ids[prompt.image_mask] == encoder.video_token_id).repeat_interleave(4)
    assert torch.equal(prompt.pixel_values[videos], expected["pixel_values_videos"])


@pytest.mark.parametrize("name", RECORDS)
def test_positions_equal_transformers(encoder: ChatEncoder, name: str) -> None:
    expected = transformers_prompt(encoder, RECORDS[name])
    with torch.device("meta"):
        oracle = Qwen3VLModel(Qwen3VLConfig(text_config={"num_hidden_layers": 1}, vision_config={"depth": 1}))
    grids = {name: expected.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    positions, delta = oracle.get_rope_index(expected["input_ids"], expected["mm_token_type_ids"], **grids)
    prompt = encoder.encode_prompt(RECORDS[name])
    assert torch.equal(prompt.position_ids, positions[:, 0])
    assert prompt.next_position == len(prompt) + int(delta)


def test_a_prompt_by_hand(encoder: ChatEncoder) -> None:
    """8 frames at 4 a second are 4 at 2 a second: the frames 0, 2, 5 and 7, at 0, 0.5, 1.25 and 1.75 seconds."""
    prompt = encoder.encode_prompt(RECORDS["one video"])
    text = encoder.tokenizer.decode(prompt.input_ids)
    pads = "<|vision_start|>" + 4 * "<|video_pad|>" + "<|vision_end|>"
    assert f"user\n<|vision_start|><0.2 seconds>{pads}<1.5 seconds>{pads}<|vision_end|>\nHow many eggs?" in text
    assert prompt.image_grid_thw.tolist() == [[1, 4, 4], [1, 4, 4]]
    first = int(prompt.image_mask.nonzero()[0])
    assert prompt.position_ids[:, first : first + 5].tolist() == [
        [first] * 4 + [first + 2],
        [first, first, first + 1, first + 1, first + 2],
        [first, first + 1, first, first + 1, first + 2],
    ]


def test_options_reach_the_video(tokenizer: PreTrainedTokenizerFast) -> None:
    def grid(**data: Any) -> list[list[int]]:
        return build(tokenizer, data=data).encode_prompt(RECORDS["one video"]).image_grid_thw.tolist()

    assert grid(video_fps=4.0) == [[1, 4, 4]] * 4
    assert grid(video_fps=4.0, video_max_frames=5) == [[1, 4, 4]] * 3
    assert grid(video_fps=0.1, video_min_frames=2) == [[1, 4, 4]]
    assert grid(video_max_pixels=4 * 32 * 32) == [[1, 2, 2]] * 2
    assert grid(video_min_pixels=4 * 96 * 96) == [[1, 6, 6]] * 2


def test_frames_in_a_folder_are_the_same_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = RECORDS["one video"].videos[0]
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(source.frames):
        (tmp_path / "clip" / f"{number}.png").write_bytes(frame.data or b"")
    own = build(tokenizer, image_root=tmp_path)
    folder = VideoSource(path=tmp_path / "clip", fps=4.0)
    prompts = [own.encode_prompt(Record("p", "<video>", videos=(video,))) for video in (source, folder)]
    for field in dataclasses.fields(prompts[0]):
        assert torch.equal(getattr(prompts[0], field.name), getattr(prompts[1], field.name))


def refuse(encoder: ChatEncoder, record: Record) -> str:
    with pytest.raises(DataError) as error:
        encoder.encode_prompt(record)
    assert f"record {record.id}" in str(error.value)
    return str(error.value)


def test_records_that_cannot_be_used(encoder: ChatEncoder) -> None:
    video = clip(32, 32, 4, fps=1.0)
    assert "0 <video> placeholders for 1 videos" in refuse(encoder, Record("a", "eggs?", videos=(video,)))
    assert "1 <video> placeholders for 0 videos" in refuse(encoder, Record("b", "<video>eggs?"))
    assert "0 <image> placeholders for 1 images" in refuse(encoder, Record("c", "<video>", (picture(32, 32),), videos=(video,)))
    broken = VideoSource(frames=(picture(32, 32), dataclasses.replace(picture(32, 32), data=b"no image")), fps=1.0)
    assert "cannot be decoded" in refuse(encoder, Record("d", "<video>", videos=(broken,)))
    assert "more than 200 times as long as wide" in refuse(encoder, Record("e", "<video>", videos=(clip(6500, 32, 2, fps=1.0),)))


def test_prompt_at_the_limit_and_beyond(tokenizer: PreTrainedTokenizerFast, encoder: ChatEncoder) -> None:
    record = RECORDS["one video"]
    length = len(encoder.encode_prompt(record))
    data = dataclasses.replace(encoder.data, max_prompt_length=length - 1)
    own = ChatEncoder(tokenizer, image_processor(), model_config(tokenizer), data, image_root=None, video_config=VIDEO_CONFIG)
    message = refuse(own, record)
    assert f"{length} tokens (8 of them visual), the limit is {length - 1}" in message and "data.video_max_pixels" in message


def test_a_placeholder_cannot_join_the_halves_of_a_special_token(encoder: ChatEncoder) -> None:
    prompt = encoder.encode_prompt(Record("p", "<|video<video>_pad|>", videos=(clip(32, 32, 2, fps=1.0),)))
    assert int(prompt.image_mask.sum()) == 1


def test_visual_tokens_are_never_sampled(encoder: ChatEncoder) -> None:
    banned = {encoder.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL if token != "<|im_end|>"}
    assert encoder.video_token_id in banned and banned <= set(encoder.banned_token_ids)


def test_models_that_take_no_videos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    record = RECORDS["one video"]
    with pytest.raises(ConfigError, match=r"no video_preprocessor_config\.json"):
        build(tokenizer, video_config=None).encode_prompt(record)
    with pytest.raises(ConfigError, match="temporal_patch_size is 1"):
        build(tokenizer, video_config=VIDEO_CONFIG | {"temporal_patch_size": 1})
    blind = byte_level_tokenizer()
    blind.chat_template = blind.chat_template.replace("<|video_pad|>", "")
    with pytest.raises(ConfigError, match="wrote 0 image and 0 video tokens, the prompt has 0 image and 1 video tokens"):
        build(blind).encode_prompt(record)
    words = ChatEncoder(
        build_tokenizer(),
        image_processor(),
        model_config(build_tokenizer()),
        DataConfig(system_prompt=SYSTEM_PROMPT),
        image_root=None,
        video_config=VIDEO_CONFIG,
    )
    with pytest.raises(DataError, match=r"does not know '<0\.2'"):
        words.encode_prompt(Record("w", "<video> sum", videos=record.videos))


def test_from_directory_reads_the_video_processor(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_model_files(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tokenizer.save_pretrained(tmp_path)
    own = model_config(tokenizer)
    config |= {key: value for key, value in own.items() if key.endswith("token_id")}
    config["text_config"]["vocab_size"] = own["text_config"]["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    record = RECORDS["one video"]
    prompt = ChatEncoder.from_directory(tmp_path, DataConfig(), image_root=None).encode_prompt(record)
    assert prompt.image_grid_thw.tolist() == [[1, 4, 4]] * 2
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ChatEncoder.from_directory(tmp_path, DataConfig(), image_root=None)
    (tmp_path / "video_preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no video_preprocessor_config\.json"):
        ChatEncoder.from_directory(tmp_path, DataConfig(), image_root=None).encode_prompt(record)
