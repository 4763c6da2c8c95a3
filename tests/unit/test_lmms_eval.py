"""The bridge to lmms-eval: its regex filter with our pattern is our format, and the template asks for it."""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from helpers.chat import byte_level_tokenizer, image_processor, model_config

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.chat import DEFAULT_SYSTEM_PROMPT, ChatEncoder
from prism_nemo.rewards.format import TAGS, parse_response, response_text

TOOL = Path(__file__).resolve().parents[2] / "tools" / "lmms_eval.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lmms_eval_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load()


def filtered(response: str, settings: dict[str, object]) -> str:
    """As lmms-eval's regex filter does it: all matches, one of them by number, stripped; otherwise the fallback."""
    found = re.findall(str(settings["regex_pattern"]), response)
    return found[int(str(settings["group_select"]))].strip() if found else str(settings["fallback"])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The task as its YAML says."""
    original = tmp_path_factory.mktemp("tasks") / "mathvista_testmini_format.yaml"
    original.write_text('dataset_path: x\ntask: "mathvista_testmini_format"\ndoc_to_text: !function utils.text\n')
    done = subprocess.run([sys.executable, TOOL, "task", original], capture_output=True, text=True, timeout=120, check=True)
    out = original.with_name("mathvista_testmini_format_prism.yaml")
    assert done.stdout.strip() == str(out)
    return yaml.safe_load(out.read_text())


def settings_of(task: dict) -> dict[str, object]:
    (entry,) = task["filter_list"]
    regex, first = entry["filter"]
    assert (regex.pop("function", "regex"), first["function"]) == ("regex", "take_first")
    return regex


def test_a_task_is_the_original_one_with_the_filter(task: dict) -> None:
    assert (task["include"], task["task"]) == ("mathvista_testmini_format.yaml", "mathvista_testmini_format_prism")
    assert task["generation_kwargs"]["max_new_tokens"] == 8192
    assert settings_of(task)["regex_pattern"] == tool.ANSWER_PATTERN


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (response_text("a cat", "one", "B"), "B"),
        ("\n <caption></caption>\n<think>\n1 < 2\n</think> <answer>\n (B)\nor so </answer>\n", "(B)\nor so"),
        ("<caption>a</caption> <think>b</think> <answer> </answer>", "[invalid]"),
        ("<think>b</think> <answer>B</answer>", "[invalid]"),
        ("<caption>a</caption> <think><answer>A</answer></think> <answer>B</answer>", "[invalid]"),
        ("<caption>a</caption> <think>b</think> <answer>A</answer> <answer>B</answer>", "[invalid]"),
        ("Sure! <caption>a</caption> <think>b</think> <answer>B</answer>", "[invalid]"),
        ("B", "[invalid]"),
        ("", "[invalid]"),
    ],
)
def test_the_filter_takes_the_answer(response: str, expected: str, task: dict) -> None:
    assert filtered(response, settings_of(task)) == expected


def test_the_filter_and_the_reward_agree_on_any_text(task: dict) -> None:
    generator, settings = random.Random(0), settings_of(task)
    pieces = [*TAGS, *TAGS, " ", "\n", "B", "a < b", "<answer", "</think", "\u00a0", "\u2028", "é", ""]
    valid = 0
    for _ in range(20_000):
        if generator.random() < 0.5:
            parts = [piece for tag in TAGS for piece in (tag, generator.choice(["", " ", "B", "\n", "\u2028"]))]
            if generator.random() < 0.5:
                parts[generator.randrange(len(parts))] = generator.choice(pieces)
        else:
            parts = generator.choices(pieces, k=generator.randrange(20))
        text = "".join(parts)
        parsed = parse_response(text)
        valid += parsed is not None
        assert filtered(text, settings) == ("[invalid]" if parsed is None else parsed.answer), repr(text)
    assert valid > 500


def test_the_filter_is_quick_on_long_and_hostile_text(task: dict) -> None:
    pattern = str(settings_of(task)["regex_pattern"])
    for text in (
        "<caption>" + "<think>" * 50_000,
        "<caption>" + " " * 200_000,
        "<caption>x</caption>" + " " * 100_000 + "<think",
    ):
        assert not re.findall(pattern, text)
    assert not re.findall(pattern, f"<caption>c</caption> <think>t</think> <answer>B{' ' * 100_000}")
    long = response_text("c" * 100_000, "t " * 100_000, "B")
    assert re.findall(pattern, long) == ["B"]
    spaces = f"<caption>c</caption> <think>t</think> <answer>{' ' * 20_000}B{' ' * 20_000}</answer>"
    assert filtered(spaces, settings_of(task)) == "B"


def test_the_template_asks_for_the_format(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    wanted = tokenizer.apply_chat_template(
        [{"role": "system", "content": DEFAULT_SYSTEM_PROMPT}, user], add_generation_prompt=True, tokenize=False
    )
    for _ in range(2):  # again changes nothing
        tool.write_template(tmp_path, None)
        tokenizer.chat_template = (tmp_path / "chat_template.jinja").read_text()
        for given in ([user], [{"role": "system", "content": "You are a helpful assistant."}, user]):
            assert tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False) == wanted


def test_what_training_shows_the_model_is_the_same_with_either_template(tmp_path: Path) -> None:
    """So an exported model with the changed template can be trained and evaluated here as before."""
    tokenizer = byte_level_tokenizer()
    prompt = 'Say "yes" \\ {{ no }} 数'
    (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template)
    tool.write_template(tmp_path, prompt)
    changed = byte_level_tokenizer()
    changed.chat_template = (tmp_path / "chat_template.jinja").read_text()
    encoders = [
        ChatEncoder(one, image_processor(), model_config(one), DataConfig(system_prompt=prompt), image_root=None)
        for one in (tokenizer, changed)
    ]
    shown = [encoder._render([{"type": "image"}, {"type": "text", "text": "How many?"}]) for encoder in encoders]
    assert shown[0] == shown[1] and prompt in shown[0]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for arguments, message in (
        (["template", tmp_path], "there is no chat_template.jinja"),
        (["task", tmp_path / "x"], "cannot read"),
    ):
        done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "group.yaml").write_text("group: x\n")
    done = subprocess.run([sys.executable, TOOL, "task", tmp_path / "group.yaml"], capture_output=True, text=True, timeout=120)
    assert "has no `task`" in done.stderr
