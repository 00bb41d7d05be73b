"""``gem-vllm export``: where it may write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gem_vllm.commands.export import export
from gem_vllm.errors import GemError


def test_not_into_its_own_source_but_onto_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint(), tmp_path / "gem")
    with pytest.raises(GemError, match=r"is in .*, which is read"):
        export(folder, folder / "st")
    assert not (folder / "st").exists()
    export(folder, folder)
    assert (folder / "modules.json").is_file()


def test_what_is_there_is_replaced_only_if_told(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_checkpoint(), tmp_path / "other")
    with pytest.raises(GemError, match=r"other is not empty; replace it with --overwrite"):
        export(tiny_checkpoint(), other)
    assert not (other / "modules.json").exists()
    export(tiny_checkpoint(), other, overwrite=True)
    assert (other / "modules.json").is_file()
