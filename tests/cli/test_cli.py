"""The command line as a user meets it: help, exit codes, messages."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.main import get_command

from gem_vllm import cli
from gem_vllm.compat import installed_vllm
from gem_vllm.errors import GemError
from tests.imports import imported

SUBCOMMANDS = (
    *("fetch", "train", "mine", "questions", "adapter", "embed", "serve", "key"),
    *("evaluate", "export", "demo"),
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gem_vllm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_help_names_every_subcommand() -> None:
    assert sorted(get_command(cli.app).commands) == sorted(SUBCOMMANDS)
    result = run("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in SUBCOMMANDS)


def test_version_names_this_and_vllm() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout == f"gem-vllm {version('gem-vllm')}, vLLM {installed_vllm()}\n"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help(name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0
    assert "Usage: " in result.stdout


def test_help_tells_defaults_that_depend_on_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """In brackets in the text itself, rich would take them for markup and leave them out."""
    monkeypatch.setenv("COLUMNS", "200")
    text = run("train", "--help").stdout
    for default in (
        "adapter 5e-4, lora 1e-4, full 1e-5",
        "0.8, adapter 0",
        "adapter constant",
        "adapter 0.8, its masks and full and lora 0.3",
    ):
        assert default in text


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    assert imported("import gem_vllm.cli", "torch", "vllm") == []


def test_what_the_user_can_mend_is_one_line_and_status_2() -> None:
    result = run("fetch", "no-such-model")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: unknown model 'no-such-model'; choose one of: smollm2-135m-instruct"
    ]


def test_unknown_options_are_status_2() -> None:
    assert run("demo", "--no-such-option").returncode == 2


@pytest.mark.parametrize("error", [GemError("mend it"), RuntimeError("a bug")])
def test_only_gem_errors_lose_their_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    expected = SystemExit if isinstance(error, GemError) else RuntimeError
    with pytest.raises(expected) as raised:
        cli.main()
    if isinstance(error, GemError):
        assert raised.value.code == 2
        assert capsys.readouterr().err == "error: mend it\n"
