"""The environment of an endpoint's own Ray, and that nothing of it stays."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private import constants

from gem_vllm.serving.ray_settings import FILES, PORTS, RAY_SETTINGS, own_ray_settings


def test_the_settings_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "3")
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    before = dict(os.environ)
    with own_ray_settings():
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert os.environ["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "3", "the user's own"
        folder = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert folder.is_dir()
    assert dict(os.environ) == before
    assert not folder.exists()


def test_two_endpoints_of_one_machine_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FILES, *PORTS):
        monkeypatch.delenv(name, raising=False)

    def own() -> list[str]:
        with own_ray_settings():
            return [os.environ[name] for name in (*FILES, *PORTS)]

    first, second = own(), own()
    assert len({*first, *second}) == len(first) + len(second)


def test_ray_knows_them_all() -> None:
    """A name that it no longer has Ray would pass over."""
    names = [name for name in (*RAY_SETTINGS, *FILES, *PORTS) if name.startswith("RAY_SERVE_")]
    source = inspect.getsource(constants)
    assert [name for name in names if f'"{name}"' not in source] == []


def test_serve_has_haproxy_where_the_settings_come_first() -> None:
    program = (
        "from gem_vllm.serving.ray_settings import own_ray_settings\n"
        "with own_ray_settings():\n"
        "    import gem_vllm.serving.endpoint\n"
        "    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY as found\n"
        "print(found)\n"
    )
    variables = {name: os.environ[name] for name in os.environ.keys() - RAY_SETTINGS.keys()}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=variables
    )
    assert done.stdout.strip() == "True", done.stderr
