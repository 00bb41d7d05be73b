"""Run mypy on the package as it is installed: training/ and serving/ are parts of gem_vllm.

setuptools maps them into it (`pyproject.toml`), which mypy does not follow; it is shown a folder of
links in which they are where they are imported from.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "gem_vllm"
MAPPED = ("training", "serving")


def main() -> None:
    """Exit with mypy's status."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / PACKAGE
        package.mkdir()
        for part in [*(ROOT / PACKAGE).iterdir(), *(ROOT / name for name in MAPPED)]:
            if part.name != "__pycache__":
                (package / part.name).symlink_to(part)
        command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
        command += ["--cache-dir", ROOT / ".mypy_cache", "--package", PACKAGE]
        environment = {**os.environ, "MYPYPATH": folder}
        sys.exit(subprocess.run(command, cwd=folder, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
