"""The files of a training run, and when they are whole."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gem_vllm.errors import GemError
from gem_vllm.folders import (
    check_writable,
    is_no_room,
    read_json,
    refuse_inside,
    writable_parent,
    write_json,
)
from gem_vllm.training.options import TrainOptions, flag
from gem_vllm.weights import weights_size

OPTIONS_FILE = "options.json"
FINISHED_FILE = "finished.json"
WHOLE = "whole.json"


def check_folders(options: TrainOptions, *, resume: bool, overwrite: bool) -> None:
    """Raise GemError where --base, --out or the run's folder is not what the run needs."""
    run = options.run_folder
    if resume and overwrite:
        raise GemError("give --resume or --overwrite, not both")
    if not os.path.isdir(options.base):
        raise GemError(f"--base {options.base} is not a folder; name a model folder here")
    if options.teacher is not None and not os.path.isdir(options.teacher):
        raise GemError(f"--teacher {options.teacher} is not a folder; name a GEM checkpoint here")
    refuse_inside(options.out, options.base)  # checkpoints there would change its hash
    used = [path for path in (options.out, run) if os.path.exists(path) and not _is_empty(path)]
    if used and not resume and not overwrite:
        raise GemError(
            f"{used[0]} is not empty; continue its run with --resume, start anew with --overwrite,"
            " or choose another --out"
        )
    if not (resume and is_finished(options)):
        check_writable(options.out, weight_bytes=weights_size(options.base))
        writable_parent(run / OPTIONS_FILE)
    recorded = run / OPTIONS_FILE
    if resume and options.out in used and not recorded.is_file():
        raise GemError(
            f"{options.out} is there, but not the run that it is of ({run}), to be continued; "
            "start anew with --overwrite, or choose another --out"
        )
    if overwrite and run.exists() and not recorded.is_file():
        raise GemError(f"{run} is no folder of a training run; remove it, or choose another --out")
    if resume and recorded.is_file():
        differs = options.difference(read_json(recorded))
        if differs:
            flags = ", ".join(flag(name) for name in differs)
            raise GemError(f"--resume needs the options of the run's start; these differ: {flags}")


def start_run(options: TrainOptions, *, resume: bool) -> None:
    """Make the run's folder, anew, or with the whole checkpoints that there are to go on from."""
    run = options.run_folder
    if run.exists() and not resume:
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / FINISHED_FILE).unlink(missing_ok=True)  # its result is gone
    if not (run / OPTIONS_FILE).is_file():
        write_json(run / OPTIONS_FILE, options.bound())
    whole = whole_checkpoints(run)
    for partial in set(run.glob("checkpoint-*")).difference(whole):
        shutil.rmtree(partial)
    if resume:
        where = f"step {step_of(whole[-1])}" if whole else "the start"
        print(f"{run}: continuing from {where}", file=sys.stderr)


def is_finished(options: TrainOptions) -> bool:
    """Whether the run has written its result, and it is still there."""
    return os.path.isfile(options.run_folder / FINISHED_FILE) and options.out.is_dir()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether writing failed for want of space; what torch raises then does not say so."""
    return is_no_room(error) or shutil.disk_usage(folder).free < 1 << 20


class MarkWhole(TrainerCallback):
    """Mark a checkpoint whole once all of it is on disk; only such a one is resumed from.

    ``Trainer`` deletes an older checkpoint only when the newer one is written, and two at least are
    kept, so one that is whole is there whatever happens while the next is being written.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Flush the new checkpoint's files to disk, then write the mark."""
        PartialState().wait_for_everyone()  # each process has a file of its own in it
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {}
        for path in sorted(folder.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        mark = folder / f"{WHOLE}.tmp"
        with mark.open("w", encoding="utf-8") as file:
            json.dump(sizes, file)
            file.flush()
            os.fsync(file.fileno())
        mark.replace(folder / WHOLE)


def whole_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoints of a run that are complete, oldest first."""
    found = [
        folder
        for folder in run_folder.glob("checkpoint-*")
        if (mark := folder / WHOLE).is_file() and _matches(folder, json.loads(mark.read_text()))
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def _matches(folder: Path, sizes: dict[str, int]) -> bool:
    return all(
        (path := folder / name).is_file() and path.stat().st_size == size
        for name, size in sizes.items()
    )
