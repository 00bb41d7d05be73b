"""What code imports, seen in a fresh interpreter: here other tests may have imported it."""

from __future__ import annotations

import subprocess
import sys


def imported(code: str, *names: str) -> list[str]:
    """Which of the modules ``names`` are there once ``code`` has run."""
    program = f"{code}\nimport sys\nprint(*(name for name in {names!r} if name in sys.modules))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Before it may be what vLLM says.
    return done.stdout.splitlines()[-1].split()
