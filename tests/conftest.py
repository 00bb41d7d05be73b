"""Fixtures that every test shares: tiny models, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The files that take longest, for them to be begun first where files are shared among workers.
LONGEST = (
    "plugin/test_runner_v2.py",
    "plugin/test_smollm2.py",
    "plugin/test_data_parallel.py",
    "training/test_processes.py",
    "plugin/test_parallel.py",
    "training/test_run.py",
)

# How long an example takes says what else the machine does, not what is wrong.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_tiny_base` without the folder; one and the same for the same arguments. Read only."""
    from tests.tiny import make_tiny_base  # whoever only collects tests has no need of torch

    @cache
    def make(family: str = "llama", **options: Any) -> Path:
        return make_tiny_base(family, tmp_path_factory.mktemp(family) / "base", **options)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Callable[..., Path]
) -> Callable[..., Path]:
    """`make_tiny_checkpoint` without the folder, on `tiny_base`'s base. Read only."""
    from tests.tiny import make_tiny_checkpoint

    @cache
    def make(family: str = "llama", *, k: int = 3, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(family) / f"gem-k{k}"
        own = {"pooling", "train_mode", "seed", "instruction_ids", "target_modules"}
        base = tiny_base(family, **{key: options[key] for key in options if key not in own})
        options = {key: options[key] for key in options if key in own}
        return make_tiny_checkpoint(family, folder, k=k, base=base, **options)

    return make
