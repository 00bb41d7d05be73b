"""The command on a model card, which makes the run again."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import pytest

from gem_vllm.training.model_card import command_line
from gem_vllm.training.options import TrainOptions


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 160}, "--steps 160"),
        ({"mode": "full", "steps": 160}, "--mode full --steps 160"),
        (
            {"mode": "full", "steps": 160, "alpha_steps": 100},
            "--mode full --steps 160 --alpha-steps 100",
        ),
        ({"mode": "lora", "alpha_steps": 16}, "--mode lora --steps 1000 --alpha-steps 16"),
    ],
)
def test_steps_of_the_schedule_are_what_they_were(
    options: TrainOptions, changes: dict[str, Any], words: str
) -> None:
    run = TrainOptions(base=options.base, data=options.data, out=options.out, **changes)
    assert " ".join(command_line(run).replace("\\\n", "").split()).endswith(words)


def test_a_data_set_has_its_owner_and_a_file_no_folder(options: TrainOptions) -> None:
    data = (*options.data, "owner/name:train")
    command = command_line(dataclasses.replace(options, data=data))
    words = shlex.split(command.replace("\\\n", ""))
    assert [words[i + 1] for i, word in enumerate(words) if word == "--data"] == [
        "texts.txt",
        "owner/name:train",
    ]
