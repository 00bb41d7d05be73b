"""What the scripts here have in common: where a figure is from, turns, tables, and their ends."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil

from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.folders import read_json, write_json, write_whole
from gem_vllm.machine import cpu_name, has_cuda

ROOT = Path(__file__).resolve().parents[1]
# Environment of the vLLM that is compared with one engine: as where gem-vllm is not installed.
PLAIN_VLLM = {"VLLM_PLUGINS": ""}

T = TypeVar("T")


def run_script(main: Callable[[], None]) -> None:
    """Run a script; what its user can mend is one line and exit status 2."""
    try:
        main()
    except GemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def add_out(parser: argparse.ArgumentParser, *, goes_on: bool = False) -> None:
    """Give a script's command line ``--out``, the folder that its results go to.

    Args:
        parser: of the script.
        goes_on: whether it keeps the results that are there beside its own; by default they go to
            the kept ones then. Else to a folder apart, so that a short run replaces none of them.
    """
    default = ROOT / "benchmarks" / "results" if goes_on else ROOT / "runs" / "benchmarks"
    parser.add_argument(
        "--out",
        type=results_folder,
        default=str(default),
        help=f"default: {default.relative_to(ROOT)}",
    )


def results_folder(argument: str) -> Path:
    """The folder of that name, made at once and not after an hour's work.

    Raises:
        ArgumentTypeError: nothing can be written there.
    """
    folder = Path(argument)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"nothing can be written in {folder}")
    return folder


def check_models(checkpoint: Path, base: Path) -> None:
    """Raise GemError for what is no GEM checkpoint, or no base beside it."""
    GemConfig.from_pretrained(checkpoint)
    if not any(base.glob("*.safetensors")):
        raise GemError(f"{base} holds no *.safetensors; --base is a Hugging Face model folder")
    if "gem_config" in read_json(base / "config.json"):
        raise GemError(f"{base} is a GEM checkpoint; --base is what it was made from")


def about(*packages: str) -> dict[str, str]:
    """Where, with what and when a result is measured; for a script to ask before it measures.

    Args:
        packages: whose versions count, beside Python's and gem-vllm's.
    """
    shown = (f"{package} {version(package)}" for package in ("gem-vllm", *packages))
    return {
        "hardware": f"{hardware()}, cores {sorted(os.sched_getaffinity(0))}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "command": shown_command(sys.argv),
        "commit": commit(),
        "versions": ", ".join((f"Python {platform.python_version()}", *shown)),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def about_table(rows: Mapping[str, str]) -> list[str]:
    """Lines of Markdown: what `about` says, with whatever else is in it."""
    return ["| | |", "|---|---|", *map(table_row, rows.items())]


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    return "\n".join(map(table_row, (head, ["---"] * len(head), *rows)))


def table_row(cells: Iterable[Any]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def write_result(
    out: Path,
    name: str,
    result: dict[str, Any],
    page: Callable[[dict[str, Any]], str],
) -> None:
    """Write ``<name>.json`` and then ``<name>.md``; what was there stays until each is whole.

    Args:
        out: folder.
        name: of both files.
        result: as JSON.
        page: makes the Markdown of it.
    """
    write_json(out / f"{name}.json", result)
    write_whole(out / f"{name}.md", page(result))


def in_turn(peers: Iterable[T], round_: int) -> list[T]:
    """The peers in an order that turns round: as they are in even rounds, else the last first."""
    ordered = list(peers)
    return ordered if round_ % 2 == 0 else ordered[::-1]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """A quarter of the values are below the first, a quarter above the second."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def hardware() -> str:
    """The GPU's name, where there is one, and the processor's."""
    import torch

    return f"{torch.cuda.get_device_name()}; {cpu_name()}" if has_cuda() else cpu_name()


def commit() -> str:
    """The checkout's commit, with a note where files, results apart, differ from it.

    A copy without its history is told by `GEM_VLLM_COMMIT`; "unknown" without either, or git.
    """
    if told := os.environ.get("GEM_VLLM_COMMIT"):
        return told

    def git(*command: str) -> str:
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:  # no git here
            return ""
        return done.stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":(exclude)benchmarks/results"
    )
    return (git("rev-parse", "HEAD") or "unknown") + (", with changes" if changed else "")


def check_same_settings(
    file: Path,
    recorded: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    option: str = "--out",
) -> None:
    """Keep what is of different settings apart; what was not recorded may be of any.

    Args:
        file: that holds what was recorded.
        recorded: settings of each result there, by the name of their option.
        settings: of this run.
        option: that names another place.

    Raises:
        GemError: a setting differs.
    """
    others = {f"--{name}" for each in recorded for name in each if each[name] != settings.get(name)}
    if others:
        names = ", ".join(sorted(others))
        raise GemError(f"{file} is of another {names}; go on with that, or choose another {option}")


def shown_command(argv: Sequence[str]) -> str:
    """The command line as others would type it: no absolute paths."""

    def shown(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return shlex.join(["python", *map(shown, argv)])
