"""What every benchmark says of where its figures are from, and how it ends."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import benchmark_script
import pytest
from benchmark_script import (
    about,
    about_table,
    add_out,
    check_same_settings,
    commit,
    in_turn,
    quartiles,
    run_script,
    shown_command,
    write_result,
)

from gem_vllm.errors import GemError

ROOT = Path(__file__).resolve().parents[2]


def test_about_says_where_and_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "bm25.py"), "--tasks", "eval"])
    monkeypatch.setenv("GEM_VLLM_COMMIT", "abc")
    rows = about("pytest")
    assert list(rows) == ["hardware", "memory", "command", "commit", "versions", "date"]
    assert all(rows.values())
    assert rows["commit"] == "abc"
    assert f"pytest {pytest.__version__}" in rows["versions"]
    table = about_table({**rows, "rounds": "3"})
    assert "| command | python benchmarks/bm25.py --tasks eval |" in table
    assert table[-1] == "| rounds | 3 |"


def test_a_machine_without_git_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GEM_VLLM_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"


def test_results_of_other_settings_are_refused() -> None:
    settings = {"base": "abc", "tasks": "def", "steps": 300}
    unknown: dict[str, str] = {}
    check_same_settings(Path("it.json"), [unknown, settings], settings)
    others = [{**settings, "tasks": "no"}, unknown, {**settings, "steps": 200}]
    with pytest.raises(GemError, match=r"^it\.json is of another --steps, --tasks; .* --out$"):
        check_same_settings(Path("it.json"), others, settings)


def test_the_shown_command_has_no_absolute_path() -> None:
    argv = ["benchmarks/engine.py", "--base", str(ROOT / "models" / "base"), "--out", "/far/away"]
    assert shown_command(argv) == "python benchmarks/engine.py --base models/base --out away"


def test_what_the_user_can_mend_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise GemError("--rounds is 0; take 3 or more")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --rounds is 0; take 3 or more\n"


def test_the_folder_for_results_is_made_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    monkeypatch.setattr(benchmark_script, "ROOT", root)
    going_on, parser = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_out(going_on, goes_on=True)
    assert going_on.parse_args([]).out == root / "benchmarks" / "results"
    add_out(parser)
    assert parser.parse_args([]).out == root / "runs" / "benchmarks"
    assert (root / "runs" / "benchmarks").is_dir()
    assert parser.parse_args(["--out", str(tmp_path / "a" / "b")]).out.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--out", str(tmp_path / "file" / "results")])
    assert ended.value.code == 2
    assert f"{tmp_path / 'file' / 'results'} cannot be made" in capsys.readouterr().err


def test_a_result_is_written_before_its_page_is_made(tmp_path: Path) -> None:
    first, second = {"name": "é", "seconds": [1.0]}, {"name": "é", "seconds": [1.0, 2.0]}

    def page(result: dict[str, Any]) -> str:
        assert json.loads((tmp_path / "it.json").read_text(encoding="utf-8")) == result
        if result == second:
            raise ValueError("no page of it")
        return f"{result['name']}\n"

    write_result(tmp_path, "it", first, page)
    with pytest.raises(ValueError, match="no page"):
        write_result(tmp_path, "it", second, page)
    assert json.loads((tmp_path / "it.json").read_text(encoding="utf-8")) == second
    assert (tmp_path / "it.md").read_text(encoding="utf-8") == "é\n"
    assert {path.name for path in tmp_path.iterdir()} == {"it.json", "it.md"}


def test_the_order_turns_round() -> None:
    peers = {"a": 1, "b": 2, "c": 3}
    assert [in_turn(peers, round_) for round_ in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def test_quartiles_of_few_rounds() -> None:
    assert quartiles([2.0]) == (2.0, 2.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.75)
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 4.0)
