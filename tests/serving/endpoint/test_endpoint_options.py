"""The options of an endpoint: from a config file and back, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from gem_vllm.errors import GemError
from gem_vllm.serving.endpoint import application
from gem_vllm.serving.endpoint.keys import new_key
from gem_vllm.serving.endpoint.operate import reason
from gem_vllm.serving.endpoint.options import EndpointOptions


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", k=2)


def test_a_config_file_gives_the_options_that_it_was_made_from(model: Path, tmp_path: Path) -> None:
    new_key(tmp_path / "keys", "a")
    options = EndpointOptions(
        model,
        max_replicas=3,
        api_keys=tmp_path / "keys",
        engine={"max_model_len": 128, "allowed_origins": ["https://page.example"]},
    )
    options.check()
    config = options.serve_config("0.0.0.0", 8001)
    schema = ServeDeploySchema.model_validate(config)
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8001)
    assert EndpointOptions.from_dict(schema.applications[0].args) == options


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "m", "replicas": 2}, "no option 'replicas'; there are: model, served_model"),
        ({"model": "m", "max_inputs": "many"}, "'max_inputs' is 'many', which is no int"),
        ({"model": "m", "min_replicas": True}, "'min_replicas' is True, which is no int"),
        ({"model": "m", "engine": "x"}, "'engine' is 'x'"),
        ({"model": "m", "api_keys": ""}, "'api_keys' is empty; give a value, or leave it out"),
        ({"min_replicas": 2}, "'model' is missing"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(GemError, match=message):
        EndpointOptions.from_dict(args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": Path("nowhere")}, "nowhere"),
        ({"min_replicas": 3}, "give 1 or more, and no more than the second"),
        ({"max_ongoing_requests": 0}, "max_ongoing_requests is 0; it must be above 0"),
        (
            {"request_timeout_s": -1.0},
            r"request_timeout_s \(--request-timeout\) is -1; it must be above 0",
        ),
        (
            {"request_timeout_s": 3601.0},
            r"request_timeout_s \(--request-timeout\) is 3601; it must be at most 3600",
        ),
        ({"engine": {"served_model_name": "x"}}, "use --served-model-name"),
        ({"engine": {"tensor_parallel_size": 2}}, "use --tensor-parallel-size"),
        ({"engine": {"api_key": ["x"]}}, "use --api-keys"),
        ({"engine": {"port": 80}}, "use --port"),
        ({"engine": {"ssl_keyfile": "x"}}, "have TLS end in front of it"),
        ({"engine": {"max_model_length": 8}}, "--engine cannot set max_model_length"),
        ({"api_keys": Path("no-keys")}, "API keys no-keys cannot be read"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str, model: Path) -> None:
    with pytest.raises(GemError, match=message):
        EndpointOptions(**{"model": model, **changes}).check()


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_a_file_without_a_key_is_refused(text: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(GemError, match="keys has no key; add one"):
        EndpointOptions(model, api_keys=tmp_path / "keys").check()


def test_a_replica_has_no_keys_of_its_own(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty name is none to vLLM, which takes what the process that starts it has otherwise."""
    needs = ((1.0, 0.0), {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, {})
    monkeypatch.setattr(application, "engine_needs", lambda _: needs)
    config = application._llm_config(EndpointOptions(model))
    assert config.runtime_env["env_vars"] == {"VLLM_API_KEY": ""}


@pytest.mark.parametrize(
    ("engine", "strategy"), [({}, "STRICT_PACK"), ({"pipeline_parallel_size": 2}, "PACK")]
)
def test_the_gpus_of_a_replica_are_of_one_node(
    engine: dict[str, Any], strategy: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    needs = ((1.0, 4.0), environment, dict(engine))
    monkeypatch.setattr(application, "engine_needs", lambda _: needs)
    config = application._llm_config(EndpointOptions(model))
    assert config.placement_group_config == {
        "bundles": [{"CPU": 1.0, "GPU": 1}, *[{"GPU": 1}] * 3],
        "strategy": strategy,
    }


def test_a_failed_start_is_told_in_one_line() -> None:
    told = "Deploying failed\nTraceback\nRuntimeError: Failed: 1 validation error\n"
    value = "  Value error, Speculative decoding is not supported. [type=value_error, input]\n"
    assert reason(told + value) == "Speculative decoding is not supported."
    assert reason("Traceback\nValueError: no room\nThe end") == "ValueError: no room"
    assert reason("") == "no reason was given"
