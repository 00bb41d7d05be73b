"""What `make clean` takes away, and what it leaves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_clean_leaves_environments_and_results(tmp_path: Path) -> None:
    left = [".venv/lib/__pycache__", ".venv-vllm-0.31.0/lib/__pycache__", "runs/evaluation"]
    gone = ["dist", ".pytest_cache", "gem_vllm/plugin/__pycache__"]
    for name in (*left, *gone):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "-s", "-f", MAKEFILE, "clean"], cwd=tmp_path, check=True)
    assert [name for name in (*left, *gone) if (tmp_path / name).exists()] == left
