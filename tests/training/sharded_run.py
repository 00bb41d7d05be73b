"""Run by `test_processes.py` in several processes: a sharded run in mode ``full``.

It stops after five of six steps, as Ctrl-C does, and its accelerate believes to be on several GPUs,
where it would put DDP around the model. (On CPUs it asks nothing.)
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import Accelerator

from gem_vllm.training.run import join_processes
from tests.training.conftest import short_options, train_until


def main() -> None:
    """Train."""
    base, data, out = map(Path, sys.argv[1:])
    join_processes()
    Accelerator.multi_device = property(lambda self: True)
    train_until(5, short_options(base, data, out, mode="full", shard=True))


if __name__ == "__main__":
    main()
