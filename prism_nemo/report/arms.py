"""The arms that a pipeline compares: names in summary.json and of the folders, labels and colours for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    key: str  # in summary.json, and the folder of the stage that ends the arm
    label: str
    color: str
    follows: str | None = None  # the arm whose policy this one goes on with, when that is not SFT's


# "longer" takes as many policy updates as align and RLVR together; "teacher SFT" goes on with SFT on the clean teacher pairs.
ARMS = (
    Arm("sft", "SFT", "#666666"),
    Arm("align", "SFT → align", "#0072b2"),
    Arm("rlvr", "SFT → align → RLVR", "#009e73", follows="align"),
    Arm("sft_rlvr", "SFT → RLVR", "#e69f00"),
    Arm("sft_rlvr_long", "SFT → RLVR, longer", "#d55e00"),
    Arm("sft_teacher", "SFT → teacher SFT", "#cc79a7"),
)
BY_KEY = {arm.key: arm for arm in ARMS}


def arm_of(key: str) -> Arm:
    """The arm called `key`; one that is not among `ARMS` goes by its own name."""
    return BY_KEY.get(key) or Arm(key, key, "#000000")


def in_order(keys: set[str]) -> list[Arm]:
    """The arms of `keys`, the known ones in their order, then the others by name."""
    return [arm for arm in ARMS if arm.key in keys] + [arm_of(key) for key in sorted(keys - BY_KEY.keys())]
