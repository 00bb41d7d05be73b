"""`gem-vllm serve` and `gem-vllm key` at their door: what is refused, and what is printed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gem_vllm import cli
from gem_vllm.serving.endpoint.keys import ApiKeys


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command; exit code, standard output, standard error."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["gem-vllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run_command


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", k=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-replicas", "0"], "give 1 or more"),
        (["--min-replicas", "2", "--max-replicas", "1"], "no more than the second"),
        (["--cpus-per-replica", "0.5"], "--cpus-per-replica is 0.5"),
        (["--max-queued-requests", "0"], "max_queued_requests is 0; it must be above 0"),
        (["--request-timeout", "-1"], "request_timeout_s (--request-timeout) is -1"),
        (["--request-timeout", "nan"], "request_timeout_s (--request-timeout) is nan"),
        (["--max-body-mb", "nan"], "--max-body-mb is nan"),
        (["--max-body-mb", "0"], "max_body_bytes (--max-body-mb) is 0"),
        (["--cpus-per-replica", "inf"], "--cpus-per-replica is inf"),
        (["--port", "70000", "--print-config"], "--port is 70000; give one from 1 to 65535"),
        (["--engine", '{"data_parallel_size": 2}'], "use --max-replicas"),
        (["--engine", "{torn"], "--engine is not JSON"),
        (["--engine", '{"model": "x"}'], "--engine names a model"),
        (["--engine", '{"max_model_length": 8}'], "--engine cannot set max_model_length"),
        (["--api-keys", "nowhere"], "nowhere cannot be read"),
        (["--port", "70000"], "--port 70000 cannot be used"),
        (["--host", "198.51.100.1"], "--host 198.51.100.1 --port 8000 cannot be used"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    arguments: list[str], message: str, model: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run("serve", model, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_model_that_is_none_is_refused(
    tmp_path: Path,
    tiny_base: Callable[..., Path],
    run: Callable[..., tuple[int, str, str]],
) -> None:
    for model in (tmp_path / "missing", tiny_base("llama")):
        code, _, err = run("serve", model)
        assert code == 2
        assert str(model) in err


def test_a_port_that_is_taken_is_refused(
    model: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", model, "--port", port)
    assert code == 2
    assert f"--port {port} cannot be used" in err


def test_the_config_is_printed_for_serve_deploy(
    model: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run("serve", model, "--max-replicas", 4, "--print-config")
    assert (code, err) == (0, "")
    config = yaml.safe_load(out)
    assert config["http_options"]["host"] == "0.0.0.0"  # for every node's proxy and replicas
    (application,) = config["applications"]
    assert application["args"]["model"] == str(model)
    assert application["args"]["max_replicas"] == 4


def test_every_option_is_in_the_config(
    model: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    """None of them is a default, and no two are alike."""
    run("key", tmp_path / "keys", "search")
    args: dict[str, Any] = {
        "served_model_name": "my-model",
        "min_replicas": 2,
        "max_replicas": 5,
        "target_ongoing_requests": 33.5,
        "cpus_per_replica": 3.0,
        "tensor_parallel_size": 4,
        "max_ongoing_requests": 77,
        "max_queued_requests": 88,
        "request_timeout": 99.0,
        "max_inputs": 111,
        "max_body_mb": 1.5,
        "api_keys": str(tmp_path / "keys"),
        "engine": '{"max_model_len": 128}',
    }
    flags = [f"--{name.replace('_', '-')}" for name in args]
    words = [word for pair in zip(flags, args.values(), strict=True) for word in pair]
    code, out, err = run(
        "serve", model, *words, "--host", "10.0.0.1", "--port", 8123, "--print-config"
    )
    assert code == 0, err
    config = yaml.safe_load(out)
    assert config["http_options"] == {"host": "10.0.0.1", "port": 8123}
    (application,) = config["applications"]
    args["model"] = str(model)
    args["request_timeout_s"] = args.pop("request_timeout")
    args["max_body_bytes"] = int(args.pop("max_body_mb") * (1 << 20))
    args["engine"] = {"max_model_len": 128}
    assert application["args"] == args


def test_as_many_replicas_are_kept_as_there_may_be(
    model: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    _, out, _ = run("serve", model, "--min-replicas", 2, "--print-config")
    (application,) = yaml.safe_load(out)["applications"]
    assert application["args"]["max_replicas"] == 2


def test_a_key_is_printed_once(tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("key", tmp_path / "keys", "search")
    assert code == 0
    assert ApiKeys.read(tmp_path / "keys").name_of(out.strip()) == "search"
    code, out, err = run("key", tmp_path / "keys", "search")
    assert (code, out) == (2, "")
    assert "has a key search already" in err
