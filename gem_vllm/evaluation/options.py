"""What an evaluation is told, checked once at the door."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.folders import (
    content_sha256,
    folder_name,
    read_json,
    refuse_inside,
    writable_parent,
)
from gem_vllm.machine import check_engine_options, engine_defaults

PROMPT_TYPES = ("query", "document")
# Perplexity depends on it, and texts of an embedding task are cut there: the same for all models.
MAX_MODEL_LEN = 2048
HUB = "hub"
MMLU_SHOTS = 5


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """One evaluation.

    Attributes:
        out: folder for its results.
        model: folder of a GEM checkpoint, for an engine in this process; or the model's name at
            ``url``.
        url: of a running server, for embedding tasks; None for an engine in this process.
        api_key: for it.
        base: folder of the base, to be measured too (mean pooling, and as an LLM).
        local: folder of tasks; see `local_tasks`.
        tasks: names, of ``local`` or of mteb; empty for all of ``local``.
        mmlu: folder with MMLU, or ``hub``.
        perplexity: file of WikiText's form, or ``hub``.
        limit: of rows or queries of each task, for a quick look.
        prompts: put before texts; see `encoder.GemEncoder`.
        engine: of vLLM's engine.
    """

    out: Path
    model: str
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    base: Path | None = None
    local: Path | None = None
    tasks: tuple[str, ...] = ()
    mmlu: str | None = None
    perplexity: str | None = None
    limit: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        """The model's in results: its folder's name, or the last part of its name at ``url``."""
        return Path(self.model).name if self.url else folder_name(self.model)

    def check(self) -> None:
        """Raise GemError for what cannot be evaluated."""
        if self.url is None:
            GemConfig.from_pretrained(Path(self.model))
        elif self.mmlu or self.perplexity:
            raise GemError(
                "--mmlu and --perplexity need an engine in this process: give --model FOLDER "
                "without --url"
            )
        if self.base is not None and "gem_config" in read_json(self.base / "config.json"):
            raise GemError(f"--base {self.base} is a GEM checkpoint; name the model it is of")
        if not (self.local or self.tasks or self.mmlu or self.perplexity):
            raise GemError("nothing to evaluate; give --local, --task, --mmlu or --perplexity")
        if self.limit is not None and self.limit < 1:
            raise GemError("--limit must be at least 1")
        refuse_inside(self.out, *self._read_folders())
        writable_parent(self.out / "any")
        check_engine_options(self.engine)

    def engine_options(self) -> dict[str, Any]:
        """What vLLM's engine is told: ``engine`` over an evaluation's own defaults."""
        known = [read_json(folder / "config.json") for folder in self._model_folders()]
        lengths = [config.get("max_position_embeddings", MAX_MODEL_LEN) for config in known]
        return engine_defaults(min([MAX_MODEL_LEN, *lengths])) | self.engine

    def bound(self) -> dict[str, Any]:
        """What a result depends on; an evaluation goes on in a folder only where it is the same.

        What ``MAY_COME_LATER`` names is None where it is not given.
        """
        values = {name: value for name, value in asdict(self).items() if name in _BOUND}
        values |= {"base": None if self.base is None else content_sha256(self.base)}
        values |= {"mmlu": _source_hash(self.mmlu), "perplexity": _source_hash(self.perplexity)}
        if self.mmlu == HUB:
            values["mmlu"] = f"{HUB}, {MMLU_SHOTS}-shot"
        if self.url is None:
            values["model"] = content_sha256(Path(self.model))
        return values

    def _model_folders(self) -> list[Path]:
        model = None if self.url else Path(self.model)
        return [folder for folder in (model, self.base) if folder is not None]

    def _read_folders(self) -> list[Path]:
        """What must stay as it is while its results are being written."""
        others = (self.local, None if self.mmlu in (None, HUB) else Path(self.mmlu))
        return [*self._model_folders(), *(folder for folder in others if folder is not None)]


def _source_hash(source: str | None) -> str | None:
    """Of the contents of a file or folder; ``hub`` stays what it is."""
    if source is None or source == HUB:
        return source
    return content_sha256(Path(source))


_BOUND = ("model", "url", "limit", "prompts", "engine")
# One of these not given is no difference: what it brings is added to the others' results.
MAY_COME_LATER = ("base", "mmlu", "perplexity")


def read_prompts(text: str | None) -> dict[str, str]:
    """The prompts of ``--prompts``: a JSON object, or a file of one."""
    if text is None:
        return {}
    try:
        is_json = text.lstrip().startswith("{") or not os.path.isfile(text)
        prompts = json.loads(text if is_json else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GemError(f"--prompts is neither a file nor JSON ({error})") from error
    if not isinstance(prompts, dict) or not all(isinstance(v, str) for v in prompts.values()):
        raise GemError('--prompts wants texts by name, such as {"Retrieval-query": "Question: "}')
    return prompts
