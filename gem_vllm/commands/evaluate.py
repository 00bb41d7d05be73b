"""``gem-vllm evaluate``: how well a checkpoint embeds, and what it is as an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gem_vllm.errors import GemError


def evaluate(
    model: Annotated[
        str, typer.Option(help="Folder of a GEM checkpoint; with --url, the model's name there.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; run again to go on.")],
    local: Annotated[
        Path | None,
        typer.Option(help="Folder with a folder of .jsonl(.gz) files for each embedding task."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="An embedding task, of --local or of mteb; can be given several times."),
    ] = None,
    mmlu: Annotated[
        str | None,
        typer.Option(help="Measure MMLU, 5-shot: a folder with dev and test*.jsonl(.gz), or hub."),
    ] = None,
    perplexity: Annotated[
        str | None,
        typer.Option(help="Measure perplexity: a file of WikiText's form, also .gz, or hub."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The base model's folder: measured too, embedding by mean pooling."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Of a running server, such as http://localhost:8000.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="GEM_VLLM_API_KEY", help="For that server.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Put before texts, as JSON or a file of it, by a task's name or type, query or "
            'document, or both: \'{"Retrieval-query": "Question: "}\'.'
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="So many rows or queries of each --local task, questions of each subject of "
            "--mmlu and documents of --perplexity, for a quick look."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Options of the vLLM engine, as JSON: '{\"max_model_len\": 1024}'.")
    ] = "{}",
) -> None:
    """Measure embedding quality (mteb) and language quality (lm-eval) of a GEM checkpoint.

    The checkpoint runs on the engine that serves it, or on a server at --url, and of its base the
    mean pooling on transformers, in float32. Results of each task are kept in --out
    as they come, as mteb and lm-eval write them, with a table (results.md) and a plot in the end;
    the same command, run again, does what is missing. An example:

    gem-vllm evaluate --model my-model --base my-base --local tasks --out runs/evaluation
    """
    try:
        import lm_eval  # noqa: F401
        import mteb  # noqa: F401
    except ImportError as error:
        raise GemError(
            f"gem-vllm evaluate needs mteb and lm-eval ({error}); install them with: "
            "pip install -e '.[eval]', in the folder of gem-vllm's source"
        ) from error
    from gem_vllm.commands.json_option import json_object
    from gem_vllm.evaluation.options import EvaluateOptions, read_prompts
    from gem_vllm.evaluation.run import evaluate as run_evaluation

    options = EvaluateOptions(
        out=out,
        model=model,
        url=url,
        api_key=api_key,
        base=base,
        local=local,
        tasks=tuple(task or ()),
        mmlu=mmlu,
        perplexity=perplexity,
        limit=limit,
        prompts=read_prompts(prompts),
        engine=json_object(engine),
    )
    try:
        folder = run_evaluation(options, lambda line: typer.echo(line, err=True))
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is done is in {out}: run the command again", err=True)
        raise typer.Exit(130) from None
    typer.echo((folder / "results.md").read_text(encoding="utf-8"))
