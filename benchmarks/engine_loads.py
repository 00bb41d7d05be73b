"""What the peers of `engine.py` are asked to do, and how much of it makes a turn.

A load, as `engine_peer.py` takes it, names the texts to embed and says how many of them, how many
completions, and how many of each may be in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine_report import PEER_OF

COUNTS = ("embed", "generate", "embed_in_flight", "generate_in_flight")
MIXED_TEXTS = "embed 30"


@dataclass(frozen=True)
class Size:
    """About how long plain vLLM takes for a turn, and tokens of a completion.

    Attributes:
        solo_seconds: for a turn of one task alone, on all cores.
        mixed_seconds: for all of a mixed load, each task alone and on all cores.
        max_tokens: of every completion.
    """

    solo_seconds: float
    mixed_seconds: float
    max_tokens: int

    def longer(self, times: int) -> Size:
        """The same with turns of that many times the length."""
        return replace(
            self, solo_seconds=times * self.solo_seconds, mixed_seconds=times * self.mixed_seconds
        )


FULL = Size(solo_seconds=3.0, mixed_seconds=6.0, max_tokens=32)
QUICK = Size(solo_seconds=1.0, mixed_seconds=2.0, max_tokens=8)


@dataclass(frozen=True)
class Device:
    """What a kind of device is kept busy by, and how its engines are set up.

    Attributes:
        embeddings: texts in flight of a mixed load.
        generations: completions in flight.
        first_amounts: task to how much of it is enough for full batches: the first turns.
        settle_seconds: between turns, until the peer before uses nothing any more.
        options: of vLLM's engines: what `vllm serve` takes on such a device, but without the
            prefix cache: every text is computed.
    """

    embeddings: int
    generations: int
    first_amounts: dict[str, int]
    settle_seconds: float
    options: dict[str, Any]


_OPTIONS = {"max_model_len": 512, "enable_prefix_caching": False}
CPU = Device(
    embeddings=32,
    generations=32,
    # Small enough for a slow machine.
    first_amounts={"embed 30": 64, "embed 230": 9, "generate": 32},
    # A vLLM worker on a CPU spins for a second behind its last step before it sleeps.
    settle_seconds=1.5,
    options={
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 128,
        "kv_cache_memory_bytes": 1 << 30,
        **_OPTIONS,
    },
)
CUDA = Device(
    embeddings=256,
    generations=256,
    first_amounts={"embed 30": 8192, "embed 230": 2048, "generate": 256},
    settle_seconds=0.0,
    options={
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 512,
        # All peers hold their memory at once, and start at once: none can tell what it may take.
        "gpu_memory_utilization": 0.15,
        "kv_cache_memory_bytes": 4 << 30,
        **_OPTIONS,
    },
)


def tasks_of(kind: str) -> list[str]:
    """The tasks that a peer of this kind does."""
    return [
        task
        for task, plain in PEER_OF.items()
        if kind in ("gem", plain) or (kind == "transformers" and task != "generate")
    ]


def solo_load(task: str, amount: int, generations: int) -> dict[str, Any]:
    """A task alone: ``amount`` texts all at once, or completions, ``generations`` at once."""
    if task == "generate":
        return _load(MIXED_TEXTS, 0, amount, 0, generations)
    return _load(task, amount, 0, amount, 0)


def solo_amount(task: str, per_second: float, seconds: float, generations: int) -> int:
    """Texts, or completions in whole groups of ``generations``, that take ``seconds``."""
    group = generations if task == "generate" else 1
    return max(1, round(per_second * seconds / group)) * group


def mixed_amounts(share: float, per_second: Mapping[str, float], seconds: float) -> tuple[int, int]:
    """Texts that take ``share`` of ``seconds``, and completions that take the rest.

    Args:
        share: 0 to 1.
        per_second: task to texts or completions per second, each task alone.
        seconds: for both, one after the other.
    """
    texts = share * seconds * per_second[MIXED_TEXTS]
    completions = (1 - share) * seconds * per_second["generate"]
    return max(1, round(texts)), max(1, round(completions))


def mixed_loads(texts: int, completions: int, device: Device) -> dict[str, dict[str, Any]]:
    """A mixed load as "one" engine gets it, and its two parts, "embed" and "generate"."""
    embed = _load(MIXED_TEXTS, texts, 0, device.embeddings, 0)
    generate = _load(MIXED_TEXTS, 0, completions, 0, device.generations)
    one = {key: embed[key] or generate[key] for key in embed}
    return {"one": one, "embed": embed, "generate": generate}


def _load(texts: str, *counts: int) -> dict[str, Any]:
    return {"texts": texts, **dict(zip(COUNTS, counts, strict=True))}
