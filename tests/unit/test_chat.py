"""The chat encoder against transformers' own Qwen3-VL processor, and everything it must refuse."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.chat import (
    RESPONSE,
    SPECIAL,
    ImageOnlyProcessor,
    byte_level_tokenizer,
    image_processor,
    model_config,
    picture,
)
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.chat import DEFAULT_SYSTEM_PROMPT, ChatEncoder
from prism_nemo.data.digits_model import build_tokenizer, write_model_files
from prism_nemo.data.digits_text import SYSTEM_PROMPT
from prism_nemo.data.readers import read_records
from prism_nemo.data.records import ImageSource, Record
from prism_nemo.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
    return ChatEncoder(tokenizer, image_processor(), model_config(tokenizer), DataConfig(), image_root=None)


def with_data(encoder: ChatEncoder, **changes: Any) -> ChatEncoder:
    data = dataclasses.replace(encoder.data, **changes)
    return ChatEncoder(
        encoder.tokenizer, encoder.image_processor, model_config(encoder.tokenizer), data, image_root=encoder.image_root
    )


PROMPTS = {
    "text": Record("t", "How many eggs?"),
    "one image": Record("o", "<image>\nHow many eggs?", (picture(100, 40),)),
    "three images": Record(
        "m", "from <image> to <image>, not <image>", (picture(64, 64), picture(33, 190, 1), picture(300, 260, 2))
    ),
    "other scripts": Record("u", "多少个鸡蛋？ <image>\u0301 œufs <caption> & <think>", (picture(32, 32),)),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_equal_transformers(encoder: ChatEncoder, name: str) -> None:
    record = PROMPTS[name]
    images = [Image.open(io.BytesIO(source.data or b"")) for source in record.images]
    processor = ImageOnlyProcessor(image_processor=image_processor(), tokenizer=encoder.tokenizer)
    parts = record.prompt.split("<image>")
    user = parts[0] + "".join("<|vision_start|><|image_pad|><|vision_end|>" + part for part in parts[1:])
    text = f"<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    expected = processor(text=[text], images=images or None, return_tensors="pt")

    prompt = encoder.encode_prompt(record)
    assert torch.equal(prompt.input_ids, expected["input_ids"][0])
    assert torch.equal(prompt.image_mask, expected["mm_token_type_ids"][0] == 1)
    if images:
        assert torch.equal(prompt.image_grid_thw, expected["image_grid_thw"])
        assert torch.equal(prompt.pixel_values, expected["pixel_values"])
        assert int(prompt.image_mask.sum()) == int(expected["image_grid_thw"].prod(-1).sum()) // 4
    else:
        assert prompt.pixel_values.shape == (0, 1536) and prompt.image_grid_thw.shape == (0, 3)


def test_positions_follow_the_grid(encoder: ChatEncoder) -> None:
    prompt = encoder.encode_prompt(Record("p", "<image>", (picture(96, 64),)))
    first = int(prompt.image_mask.nonzero()[0])
    assert prompt.position_ids[:, first : first + 6].tolist() == [
        [first] * 6,
        [first] * 3 + [first + 1] * 3,
        [first, first + 1, first + 2] * 2,
    ]
    assert prompt.position_ids[:, first + 6].tolist() == [first + 3] * 3
    assert prompt.next_position == len(prompt) - 3


def test_patches_are_the_images_pixels_in_merge_blocks(encoder: ChatEncoder) -> None:
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))  # the second patch of the first block
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    patches = encoder.encode_prompt(Record("p", "<image>", (ImageSource(data=buffer.getvalue()),))).pixel_values
    colours = patches.view(8, 3, 2, 16, 16)
    red, blue = [1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]
    assert colours[:, :, 0, 0, 0].tolist() == [red, blue] + [red] * 6
    assert torch.equal(colours, colours[:, :, :1, :1, :1].expand_as(colours))


def test_system_prompt_is_replaced(encoder: ChatEncoder) -> None:
    own = with_data(encoder, system_prompt="Be brief.")
    text = own.tokenizer.decode(own.encode_prompt(Record("p", "eggs?")).input_ids)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\neggs?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", [RESPONSE, "", "no tags at all", "多少个\n\n  <think>"])
def test_responses_come_back_and_end_with_the_turn(encoder: ChatEncoder, text: str) -> None:
    tokens = encoder.encode_response(text)
    assert tokens.dtype == torch.int64
    assert tokens[-1] == encoder.end_token_id
    assert tokens[:-1].tolist() == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.decode(tokens) == text
    assert torch.equal(encoder.encode_segment(text), tokens)


def test_prompt_and_response_are_one_conversation(encoder: ChatEncoder) -> None:
    messages = [
        {"role": "system", "content": DEFAULT_SYSTEM_PROMPT},
        {"role": "user", "content": "eggs?"},
        {"role": "assistant", "content": RESPONSE},
    ]
    whole = encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    own = [*encoder.encode_prompt(Record("p", "eggs?")).input_ids.tolist(), *encoder.encode_response(RESPONSE).tolist()]
    assert encoder.tokenizer.decode(whole) == encoder.tokenizer.decode(own) + "\n"


def test_decode_stops_at_the_end_and_hides_nothing(encoder: ChatEncoder) -> None:
    tokens = [*encoder.encode_response("a <answer> b").tolist(), *encoder.encode_response("later").tolist()]
    assert encoder.decode(tokens) == "a <answer> b"
    assert encoder.decode([encoder.image_token_id, *tokens]) == "<|image_pad|>a <answer> b"
    assert encoder.decode(tokens[:2]) == encoder.tokenizer.decode(tokens[:2])


def test_banned_tokens(encoder: ChatEncoder) -> None:
    ids = {token: encoder.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    spare = range(len(encoder.tokenizer), len(encoder.tokenizer) + 5)
    expected = {*ids.values(), *spare} - {ids["<|im_end|>"]}
    assert encoder.banned_token_ids == tuple(sorted(expected))
    assert encoder.end_token_id == ids["<|im_end|>"] and encoder.pad_token_id == ids["<|endoftext|>"]


def test_word_level_tokenizer_with_the_same_code() -> None:
    tokenizer = build_tokenizer()
    own = ChatEncoder(
        tokenizer, image_processor(), model_config(tokenizer), DataConfig(system_prompt=SYSTEM_PROMPT), image_root=None
    )
    words = tokenizer.convert_ids_to_tokens(
        own.encode_prompt(Record("p", "<image> how many even", (picture(96, 32),))).input_ids.tolist()
    )
    assert " ".join(words) == (
        "<|im_start|> system <caption> <think> <answer> <|im_end|> <|im_start|> user "
        "<|vision_start|> <|image_pad|> <|image_pad|> <|image_pad|> <|vision_end|> "
        "how many even <|im_end|> <|im_start|> assistant"
    )
    with pytest.raises(DataError, match=r"(?s)does not know 'zebras'.*record z"):
        own.encode_prompt(Record("z", "how many zebras"))
    with pytest.raises(DataError, match="does not know 'zebras'"):
        own.encode_response("many zebras")
    with pytest.raises(ConfigError, match=r"data\.system_prompt"):
        ChatEncoder(tokenizer, image_processor(), model_config(tokenizer), DataConfig(), image_root=None)


@pytest.mark.parametrize("token", SPECIAL)
def test_text_cannot_inject_special_tokens(encoder: ChatEncoder, token: str) -> None:
    for text in (f"eggs {token}?", f"{token}", f"eggs{token}<image>"):
        record = Record("evil", text, (picture(32, 32),) if "<image>" in text else ())
        with pytest.raises(DataError) as error:
            encoder.encode_prompt(record)
        assert f"the text holds the special token '{token}'" in str(error.value) and "record evil" in str(error.value)
    with pytest.raises(DataError, match="special token"):
        encoder.encode_response(f"<answer> 3 </answer>{token}")
    with pytest.raises(ConfigError, match=r"data\.system_prompt"):
        with_data(encoder, system_prompt=f"brief {token}")


def test_a_placeholder_cannot_join_the_halves_of_a_special_token(encoder: ChatEncoder) -> None:
    prompt = encoder.encode_prompt(Record("p", "<|image<image>_pad|>", (picture(64, 32),)))
    assert int(prompt.image_mask.sum()) == 2


def test_prompt_at_the_limit_and_beyond(encoder: ChatEncoder) -> None:
    record = Record("long-1", "<image> eggs?", (picture(128, 64),))
    length = len(encoder.encode_prompt(record))
    assert len(with_data(encoder, max_prompt_length=length).encode_prompt(record)) == length
    with pytest.raises(DataError) as error:
        with_data(encoder, max_prompt_length=length - 1).encode_prompt(record)
    text = str(error.value)
    assert f"{length} tokens (8 of them visual), the limit is {length - 1}" in text
    assert "record long-1" in text and "data.max_prompt_length" in text


def test_response_at_the_limit_and_beyond(encoder: ChatEncoder) -> None:
    length = len(encoder.encode_response(RESPONSE))
    assert len(with_data(encoder, max_response_length=length).encode_response(RESPONSE)) == length
    with pytest.raises(DataError, match=f"{length} tokens, the limit is {length - 1}"):
        with_data(encoder, max_response_length=length - 1).encode_response(RESPONSE)


@pytest.mark.parametrize(
    ("changes", "grid"),
    [
        ({}, [1, 16, 16]),
        ({"image_max_pixels": 128 * 128}, [1, 8, 8]),
        ({"image_min_pixels": 512 * 512, "image_max_pixels": 512 * 512}, [1, 32, 32]),
    ],
)
def test_pixel_bounds(encoder: ChatEncoder, changes: dict[str, int], grid: list[int]) -> None:
    prompt = with_data(encoder, **changes).encode_prompt(Record("p", "<image>", (picture(256, 256),)))
    assert prompt.image_grid_thw.tolist() == [grid]


def test_bad_images_name_record_and_image(encoder: ChatEncoder, tmp_path: Path) -> None:
    own = ChatEncoder(encoder.tokenizer, image_processor(), model_config(encoder.tokenizer), DataConfig(), image_root=tmp_path)
    truncated = (picture(64, 64).data or b"")[:200]
    for source, message in (
        (ImageSource(data=truncated), "cannot be decoded"),
        (ImageSource(path=Path("../up.png")), "does not exist"),
        (picture(2010, 10), "more than 200 times as long as wide"),
    ):
        with pytest.raises(DataError, match=f"(?s){message}.*record bad-7"):
            own.encode_prompt(Record("bad-7", "<image>", (source,)))


def test_placeholders_and_images_must_match(encoder: ChatEncoder) -> None:
    with pytest.raises(DataError, match="0 <image> placeholders for 1 images"):
        encoder.encode_prompt(Record("p", "eggs?", (picture(32, 32),)))


def broken(tokenizer: PreTrainedTokenizerFast, processor: Any = None, data: DataConfig | None = None, **config: Any) -> str:
    with pytest.raises(ConfigError) as error:
        ChatEncoder(
            tokenizer, processor or image_processor(), model_config(tokenizer) | config, data or DataConfig(), image_root=None
        )
    return str(error.value)


def test_parts_that_do_not_fit_together(tokenizer: PreTrainedTokenizerFast) -> None:
    other = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 65536})
    assert "patch_size is 14, the model's is 16" in broken(tokenizer, other)
    assert "image_token_id is 3" in broken(tokenizer, image_token_id=3)
    assert f"the model's embedding {len(tokenizer) - 1} rows" in broken(tokenizer, text_config={"vocab_size": len(tokenizer) - 1})
    assert "vision_config has no in_channels" in broken(tokenizer, vision_config=None)
    assert "between 5000 and 4000 pixels" in broken(tokenizer, data=DataConfig(image_min_pixels=5000, image_max_pixels=4000))
    assert "between 10 and 1000 pixels" in broken(tokenizer, data=DataConfig(image_min_pixels=10, image_max_pixels=1000))


def test_chat_templates_that_cannot_work() -> None:
    thinking = byte_level_tokenizer()
    thinking.chat_template += "{%- if add_generation_prompt %}{{- '<think>\\n' }}{%- endif %}"
    assert "opens the assistant's turn with" in broken(thinking)
    thinking.chat_template = None
    assert "no chat template" in broken(thinking)
    blind = byte_level_tokenizer()
    blind.chat_template = blind.chat_template.replace("<|image_pad|>", "")
    own = ChatEncoder(blind, image_processor(), model_config(blind), DataConfig(), image_root=None)
    with pytest.raises(ConfigError, match="wrote 0 image and 0 video tokens, the prompt has 1 image and 0 video tokens"):
        own.encode_prompt(Record("p", "<image>", (picture(32, 32),)))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_model_files(path)
    return path


def test_from_directory_and_from_a_checkpoint(directory: Path, tmp_path: Path) -> None:
    data = DataConfig(system_prompt=SYSTEM_PROMPT)
    record = Record("p", "<image> sum", (picture(128, 32),))
    direct = ChatEncoder.from_directory(directory, data, image_root=None).encode_prompt(record)
    (tmp_path / "checkpoint").mkdir()
    shutil.move(directory, tmp_path / "checkpoint" / "hf")
    carried = ChatEncoder.from_directory(tmp_path / "checkpoint", data, image_root=None).encode_prompt(record)
    assert direct.image_grid_thw.tolist() == [[1, 2, 8]]
    for field in dataclasses.fields(direct):
        assert torch.equal(getattr(direct, field.name), getattr(carried, field.name))


@pytest.mark.parametrize(
    ("data", "root"),
    [
        ({}, None),
        ({"train": "/a/train.jsonl", "validation": "/b/test.jsonl"}, "/a"),
        ({"validation": "/b/test.jsonl"}, "/b"),
        ({"train": "/a/train.jsonl", "image_root": "/c"}, "/c"),
    ],
)
def test_the_image_root_follows_the_data(directory: Path, data: dict[str, str], root: str | None) -> None:
    config = DataConfig(system_prompt=SYSTEM_PROMPT, **data)
    assert ChatEncoder.from_directory(directory, config, image_root=None).image_root == (Path(root) if root else None)
    assert ChatEncoder.from_directory(directory, config, image_root=Path("/d")).image_root == Path("/d")


def load_error(directory: Path) -> str:
    with pytest.raises(ConfigError) as error:
        ChatEncoder.from_directory(directory, DataConfig(system_prompt=SYSTEM_PROMPT), image_root=None)
    return str(error.value)


def test_directories_that_cannot_be_loaded(directory: Path, tmp_path: Path) -> None:
    assert "does not exist" in load_error(tmp_path / "nowhere")
    assert "has no config.json, tokenizer.json" in load_error(tmp_path)
    (directory / "preprocessor_config.json").rename(tmp_path / "kept")
    assert "has no preprocessor_config.json" in load_error(directory)
    (tmp_path / "kept").rename(directory / "preprocessor_config.json")
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert "cannot be loaded" in load_error(directory)


def test_code_in_the_directory_is_not_run(directory: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    own = ChatEncoder.from_directory(directory, DataConfig(system_prompt=SYSTEM_PROMPT), image_root=None)
    assert type(own.tokenizer).__module__.startswith("transformers.")
    assert not marker.exists()


def test_every_file_has_its_own_image_root(tmp_path: Path) -> None:
    """Training and held-out records lie in folders of their own, each with its images; neither may reach into the other's."""
    write_model_files(tmp_path / "model")
    data = DataConfig(system_prompt=SYSTEM_PROMPT)
    for name, color in (("train", "red"), ("test", "blue")):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (64, 32), color).save(tmp_path / name / "images" / "a.png")
        record = {"id": name, "prompt": "<image>", "images": ["images/a.png"], "answer": "1"}
        (tmp_path / name / "records.jsonl").write_text(json.dumps(record) + "\n")
        setattr(data, "train" if name == "train" else "validation", str(tmp_path / name / "records.jsonl"))
    encoder = ChatEncoder.from_directory(tmp_path / "model", data, image_root=None)
    pixels = {}
    for name, file in (("train", data.train), ("test", data.validation)):
        assert file is not None
        (record,) = read_records(Path(file), image_root=None).records
        pixels[name] = encoder.encode_prompt(record).pixel_values
    assert not torch.equal(pixels["train"], pixels["test"])
    stray = dataclasses.replace(record, images=(ImageSource(path=tmp_path / "train" / "images" / "a.png"),))
    with pytest.raises(DataError, match="lies outside the image root"):
        encoder.encode_prompt(stray)
