"""Text for the trainer's tests, made up from a seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

WORDS = (
    "bread river stone bridge library moon people rock capital city flour yeast water first old "
    "newspaper map reader hour France Paris walk lend bake keep run jump lazy quick brown"
)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 80 texts of 6 to 20 words, one a line."""
    rng = random.Random(0)
    words = WORDS.split()
    lines = [" ".join(rng.choices(words, k=rng.randint(6, 20))) for _ in range(80)]
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
