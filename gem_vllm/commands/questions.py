"""``gem-vllm questions``: pairs for training that the base itself writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gem_vllm.commands.json_option import json_object


def questions(
    base: Annotated[Path, typer.Option(help="Folder of the model that writes.")],
    data: Annotated[
        str,
        typer.Option(help="Passages: .txt or .jsonl, also .gz, or a Hugging Face dataset's name."),
    ],
    out: Annotated[Path, typer.Option(help="New file to write (.jsonl, .jsonl.gz), for --pairs.")],
    text_field: Annotated[str, typer.Option(help="Of JSON lines or of a dataset.")] = "text",
    texts: Annotated[
        int | None,
        typer.Option(help="So many passages, the first ones.", show_default="all"),
    ] = None,
    engine: Annotated[str, typer.Option(help="Options of the vLLM engine, as JSON.")] = "{}",
) -> None:
    """Have a language model write questions about passages, to train on.

    Two for each passage; kept are those whose words find their passage again, before all others.
    Better at search than dropped tokens and spans alone:

    gem-vllm questions --base my-base --data passages.txt --out questions.jsonl

    gem-vllm train --base my-base --data texts.txt --pairs questions.jsonl --out my-model

    Run the same command again to go on after an interruption.
    """
    from tqdm import tqdm

    from gem_vllm.training.questions import QuestionOptions, write_questions

    options = QuestionOptions(
        base=base,
        data=data,
        out=out,
        text_field=text_field,
        texts=texts,
        engine=json_object(engine),
    )
    with tqdm(unit=" passages", total=texts) as bar:
        asked, kept = write_questions(options, lambda done: bar.update(done - bar.n))
    typer.echo(f"{out}: {kept} questions of {asked}")
