"""Prepares an exported policy and tasks of lmms-eval for each other; docs/evaluation.md says how the pieces go together.

    python tools/lmms_eval.py template exported
    python tools/lmms_eval.py task .../lmms_eval/tasks/mathvista/mathvista_testmini_format.yaml

`template` makes the exported model's chat template ask for the response format, whatever system prompt lmms-eval gives. `task`
writes <name>_prism.yaml beside a task: the same one, with room for the reasoning and with only the text of <answer> scored.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from prism_nemo.errors import DataError, PrismError
from prism_nemo.run_directory import write_atomically

_NO_TAG = r"(?:(?!</?(?:caption|think|answer)>).)*?"
ANSWER_PATTERN = (
    rf"(?s)\A\s*<caption>{_NO_TAG}</caption>\s*<think>{_NO_TAG}</think>\s*"
    rf"<answer>(?!\s*</answer>)({_NO_TAG})</answer>\s*\Z"
)
"""Finds the answer, with white space around it, of a response of valid format, as `prism_nemo.rewards.format` has it.

lmms-eval's regex filter strips what it finds."""

INVALID = "[invalid]"  # what lmms-eval then scores: no answer, and no option's letter as a word
_MARK = "{#- response format of prism_nemo -#}"
_TEMPLATE = "chat_template.jinja"


def with_format_prompt(template: str, system_prompt: str) -> str:
    """A chat template whose system turn is `system_prompt`, in place of whichever it is given."""
    if template.startswith(_MARK):
        template = template.split("\n", 2)[2]
    turn = f'[{{"role": "system", "content": {json.dumps(system_prompt)}}}]'
    others = 'messages | rejectattr("role", "equalto", "system") | list'
    return f"{_MARK}\n{{%- set messages = {turn} + ({others}) -%}}\n{template}"


def task_of(original: Path, *, max_new_tokens: int) -> str:
    """The YAML of a task that includes `original`, which lies beside it."""
    try:
        text = original.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the task: {error.strerror}", where=str(original)) from error
    name = re.search(r"^task:\s*[\"']?([^\"'\s#]+)", text, re.MULTILINE)
    if name is None:
        raise DataError("the file has no `task`", where=str(original), remedy="name the YAML file of a task, not of a group")
    return f"""\
# {name[1]} for policies that answer in <caption>, <think>, <answer>: only the answer is scored.
include: {original.name}
task: {name[1]}_prism
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
filter_list:
  - name: prism
    filter:
      - function: regex
        group_select: -1
        fallback: "{INVALID}"
        regex_pattern: {json.dumps(ANSWER_PATTERN)}
      - function: take_first
"""


def write_template(directory: Path, system_prompt: str | None) -> Path:
    """Changes the template of an exported model. Raises DataError where there is none."""
    file = directory / _TEMPLATE
    if not file.is_file():
        raise DataError(
            f"there is no {_TEMPLATE}", where=str(directory), remedy="name a HuggingFace directory, as `convert export` writes it"
        )
    if system_prompt is None:
        from prism_nemo.data.chat import DEFAULT_SYSTEM_PROMPT

        system_prompt = DEFAULT_SYSTEM_PROMPT
    write_atomically(file, with_format_prompt(file.read_text(encoding="utf-8"), system_prompt))
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    template = commands.add_parser("template")
    template.add_argument("directory", type=Path)
    template.add_argument("--system-prompt", help="as data.system_prompt of the training; by default the same")
    task = commands.add_parser("task")
    task.add_argument("file", type=Path, nargs="+")
    task.add_argument("--max-new-tokens", type=int, default=8192)
    options = parser.parse_args()
    try:
        if options.command == "template":
            print(write_template(options.directory, options.system_prompt))
            return 0
        for file in options.file:
            out = file.with_name(f"{file.stem}_prism.yaml")
            write_atomically(out, task_of(file, max_new_tokens=options.max_new_tokens))
            print(out)
    except PrismError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
