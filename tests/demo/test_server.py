"""``vllm serve`` as the demo starts, waits for and ends it, with a stand-in for vLLM."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from gem_vllm import machine
from gem_vllm.demo import server
from gem_vllm.errors import GemError


def no_wait(seconds: float) -> None:
    pass


@pytest.mark.usefixtures("fake_vllm")
def test_it_answers_within_the_block_only(tmp_path: Path) -> None:
    with server.serve(tmp_path, tmp_path / "log", no_wait) as url:
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


@pytest.mark.usefixtures("fake_vllm")
def test_a_server_that_ends_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with (
        pytest.raises(GemError, match=r"(?s)ended with exit status 1.*no engine today"),
        server.serve(tmp_path, tmp_path / "log", no_wait),
    ):
        pytest.fail("it must not be served")


@pytest.mark.usefixtures("fake_vllm")
def test_a_server_that_stops_answering_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(GemError, match=r"(?s)stopped answering: ReadError.*the end of .*log"),
        server.serve(tmp_path, tmp_path / "log", no_wait),
    ):
        raise httpx.ReadError("")


@pytest.mark.usefixtures("fake_vllm")
def test_a_server_that_never_answers_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow").touch()
    monkeypatch.setattr(server, "START_SECONDS", 1.0)
    waits: list[float] = []
    with (
        pytest.raises(GemError, match="did not answer within 1 seconds"),
        server.serve(tmp_path, tmp_path / "log", waits.append),
    ):
        pytest.fail("it must not be served")
    assert waits


def test_the_command_caps_memory_and_names_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    command = server.serve_command(tmp_path, 1234)
    assert Path(command[0]).name == "vllm"
    assert command[1:3] == ["serve", str(tmp_path)]
    assert command[command.index("--port") + 1] == "1234"
    assert command[command.index("--served-model-name") + 1] == server.SERVED_NAME
    assert "--kv-cache-memory-bytes" in command
