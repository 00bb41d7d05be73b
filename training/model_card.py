"""The model card that is written with every trained checkpoint."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gem_vllm.training.options import FREE_ON_RESUME, TrainOptions, flag
from gem_vllm.training.trainer import SPEARMAN

CARD = """\
---
base_model: {base}
tags:
- gem
- text-embeddings
- text-generation
---
# {name}

{summary}

| | |
|---|---|
| Base | {base} |
| Data | {data} |
| Steps | {steps} |
{losses}{held_out}| Software | gem-vllm{commit} |

```
{command}
```
"""
SUMMARY = (
    "A GEM checkpoint: the language model {base}, which also gives text embeddings, by {k} special "
    "token{plural} ({pooling} pooling). {mode}"
)
MODES = {
    "adapter": "The base's weights are unchanged: trained are the special tokens and a LoRA that "
    "acts on them alone, so it chats as the base does.",
    "full": "All weights were trained.",
    "lora": "A LoRA was trained and merged into the weights.",
}
LOSSES = {
    "loss_ntp": "Next-token loss",
    "loss_cl": "Contrastive loss",
    "loss_lex": "Lexical loss",
}


def write_model_card(
    folder: Path,
    options: TrainOptions,
    log_history: Sequence[dict[str, Any]],
    commit: str | None,
) -> None:
    """Write ``README.md``: base, data, command, losses, commit. Files by name, not by place.

    log_history: what ``Trainer`` logged, one dict a log, in order. commit: of the source that ran.
    """
    base = options.base.resolve().name
    summary = SUMMARY.format(
        base=base,
        k=options.special_tokens,
        plural="" if options.special_tokens == 1 else "s",
        pooling=options.pooling,
        mode=MODES[options.mode],
    )
    card = CARD.format(
        name=options.out.resolve().name,
        base=base,
        summary=textwrap.fill(summary, width=100),
        data=_data(options),
        steps=_steps(options, max((log["step"] for log in log_history), default=options.steps)),
        losses="".join(
            f"| {title} | {row} |\n"
            for name, title in LOSSES.items()
            if (row := _first_and_last([log[name] for log in log_history if name in log]))
        ),
        held_out=_held_out(options, log_history),
        commit=f" at commit {commit}" if commit else "",
        command=command_line(options),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def command_line(options: TrainOptions) -> str:
    """The command that makes this run again, over several lines; files by name alone."""
    words = [flag("base"), options.base.resolve().name]
    for spec in options.data:
        words += [flag("data"), _name_of(spec)]
    words += [flag("out"), options.out.name]
    for name in ("pairs", "held_out_pairs", "teacher"):
        if (file := getattr(options, name)) is not None:
            words += [flag(name), Path(file).name]
    defaults = TrainOptions(
        base=options.base,
        data=options.data,
        out=options.out,
        mode=options.mode,
        steps=options.steps,
    )
    left_out = {"base", "data", "pairs", "held_out_pairs", "teacher", *FREE_ON_RESUME}
    always = {"mode", "steps"}
    if options.positives == "masks":
        always.add("drop_rate")  # whose default is another there
    if options.held_out_pairs is not None:
        left_out -= {"save_every", "patience"}  # which checkpoints there are to choose from
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in left_out:
            continue
        if field.name in always or value != getattr(defaults, field.name):
            values = value if isinstance(value, tuple) else (value,)
            for each in values:
                words += option_words(field.name, each)
    lines, line = [], "gem-vllm train"
    for word in words:
        if word.startswith("--") and len(line) > 70:
            lines.append(line)
            line = "   "
        line += " " + shlex.quote(word)
    return " \\\n".join([*lines, line])


def option_words(name: str, value: Any) -> list[str]:
    """An option on the command line, where it is not the default."""
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    return [flag(name), str(value)]


def source_commit() -> str | None:
    """The commit of the source that is running, with ``-dirty`` where it is changed, if in git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        if tracked.returncode:
            return None
        describe = [*git, "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _name_of(spec: str) -> str:
    """What a ``--data`` is called wherever it is: of a file its name, of a data set all of it."""
    return Path(spec).name if Path(spec).is_file() else spec


def _data(options: TrainOptions) -> str:
    texts = ", ".join(f"`{_name_of(spec)}`" for spec in options.data)
    if options.pairs is None:
        return texts
    return f"{texts}; {options.pairs_share:.0%} of the batches are of `{Path(options.pairs).name}`"


def _steps(options: TrainOptions, run: int) -> str:
    early = "" if run >= options.steps else f"; {options.steps} were planned"
    return f"{run} of {options.batch_size} texts{early}"


def _held_out(options: TrainOptions, log_history: Sequence[dict[str, Any]]) -> str:
    found = [(log[SPEARMAN], log["step"]) for log in log_history if SPEARMAN in log]
    if options.held_out_pairs is None or not found:
        return ""
    best, step = max(found, key=lambda pair: pair[0])  # the first of equals, as is kept
    return (
        f"| Held-out pairs | `{Path(options.held_out_pairs).name}`: Spearman {best:.4f} at step "
        f"{step}, the best of {len(found)} checkpoints, which this is |\n"
    )


def _first_and_last(values: list[float]) -> str:
    if not values:
        return ""
    share = max(len(values) // 10, 1)
    first, last = sum(values[:share]) / share, sum(values[-share:]) / share
    return f"{first:.3f} at first, {last:.3f} in the end (means over {share} logged steps)"
