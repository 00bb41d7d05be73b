"""The demo's own course, with stand-ins for training and for vLLM."""

from __future__ import annotations

import asyncio
import io
import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from gem_vllm.demo import run
from gem_vllm.demo.client import STEPS_METRIC, Client, Totals, parse_step_counts
from gem_vllm.demo.run import DemoOptions, run_demo, steps_for
from gem_vllm.demo.server import serve_command
from gem_vllm.errors import GemError
from tests.demo.stand_ins import stand_ins, without_a_model
from tests.processes import alive, started, wait_until
from tests.tiny import make_tiny_base

ROOT = Path(__file__).resolve().parents[2]
# Runs the demo in a process of its own.
DRIVER = """
import sys
from pathlib import Path
import pytest
from rich.console import Console
from gem_vllm.demo.run import DemoOptions, run_demo
from tests.demo.stand_ins import stand_ins, without_a_model
work = Path(sys.argv[1])
with pytest.MonkeyPatch.context() as patch:
    stand_ins(patch, work, sys.argv[2:])
    without_a_model(patch)
    run_demo(DemoOptions(Path("examples"), work, work / "out", 1.0), Console())
"""


def options(work: Path) -> DemoOptions:
    return DemoOptions(ROOT / "examples", work, work / "out", train_minutes=1.0)


def test_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_base("llama", tmp_path / "base")
    stand_ins(monkeypatch, tmp_path, [])
    output = io.StringIO()
    for _ in range(2):  # the second run makes the run's folder anew
        run_demo(options(tmp_path), Console(file=output, width=120))
    text = output.getvalue()
    assert text.count("In large mounds.") == 2 * len(run.QUESTIONS)
    assert "8 steps of the engine held embedding and chat at once" in text
    assert "accuracy@1" in text
    assert "40 texts" in text
    assert shlex.join(serve_command(tmp_path / "out" / "checkpoint", 8000)) in text


def test_a_server_that_fails_ends_the_demo_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(monkeypatch, tmp_path, ["broken"])
    without_a_model(monkeypatch)
    with pytest.raises(GemError, match=r"(?s)vllm serve ended.*no engine today"):
        run_demo(options(tmp_path), Console(file=io.StringIO()))


@pytest.mark.parametrize("moment", ["train-for-ever", "slow"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_process(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    reached = tmp_path / "out" / "checkpoint" / ("pids" if moment == "slow" else moment)
    command = [sys.executable, "-c", DRIVER, str(tmp_path), moment]
    with started(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 300
        while not reached.exists() and time.monotonic() < deadline and driver.poll() is None:
            time.sleep(0.05)
        assert reached.exists()
        # Of the server and of its child, whose command line says nothing of the folder.
        pids = [int(pid) for pid in reached.read_text().split()]
        assert len(pids) == (2 if moment == "slow" else 0)
        driver.send_signal(number)
        assert driver.wait(timeout=120) != 0

    def left() -> bool:
        words = (process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"]))
        return any(map(alive, pids)) or any(str(tmp_path) in " ".join(line) for line in words)

    wait_until(lambda: not left(), "all processes end", 30)


def test_foreign_folders_and_bad_input_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "fetch_model", pytest.fail)
    console = Console(file=io.StringIO())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    with pytest.raises(GemError, match="holds something else"):
        run_demo(options(tmp_path), console)
    with pytest.raises(GemError, match="does not exist; run from the repository's root"):
        run_demo(DemoOptions(tmp_path, tmp_path, tmp_path / "new", 1.0), console)
    for minutes in (0.0, math.nan, math.inf):
        with pytest.raises(GemError, match="--train-minutes must be greater than 0, and finite"):
            run_demo(DemoOptions(ROOT / "examples", tmp_path, tmp_path / "new", minutes), console)


def test_blank_lines_are_not_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backgrounds = []

    async def use_server(url: str, task: Any, background: list[str], *args: Any) -> None:
        backgrounds.append(background)

    examples = shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (examples / "wikipedia_train.txt").write_text("one text\n\n \nanother\n")
    stand_ins(monkeypatch, tmp_path, [])
    without_a_model(monkeypatch)
    monkeypatch.setattr(run, "_use_server", use_server)
    monkeypatch.setattr(run, "table", lambda report: "")
    run_demo(replace(options(tmp_path), examples=examples), Console(file=io.StringIO()))
    assert backgrounds == [["one text", "another"]]


def test_steps_follow_the_machine() -> None:
    assert steps_for(4, 600) == pytest.approx(2 * steps_for(2, 600), abs=1)
    assert steps_for(4, 1) == run.STEPS_AT_LEAST
    assert steps_for(4, 1e9) == run.STEPS_AT_MOST
    assert steps_for(1e308, 1e9) == run.STEPS_AT_MOST


def test_the_counter_is_the_plugins() -> None:
    source = (ROOT / "gem_vllm" / "plugin" / "metrics.py").read_text()
    assert f'STEPS_METRIC = "{STEPS_METRIC.removesuffix("_total")}"' in source


def test_step_counts_are_summed_over_engines() -> None:
    metrics = '# TYPE gem_steps counter\ngem_steps_total{kind="mixed",engine="0"} 2.0\n'
    metrics += 'gem_steps_total{kind="mixed",engine="1"} 3.0\nother_total{kind="mixed"} 9.0\n'
    assert parse_step_counts(metrics) == {"mixed": 5}


def test_an_error_of_the_server_is_told() -> None:
    import httpx

    def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400, text="empty input")

    async def embed() -> None:
        async with Client("http://server", transport=httpx.MockTransport(refuse)) as client:
            await client.embed_all(["a"] * 9, totals=Totals(), on_progress=lambda n: None)

    with pytest.raises(GemError, match="answered 400 to /v1/embeddings: empty input"):
        asyncio.run(embed())
