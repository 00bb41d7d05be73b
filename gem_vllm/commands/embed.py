"""``gem-vllm embed``: a batch job over many texts, on Ray."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gem_vllm.commands.json_option import json_object
from gem_vllm.commands.on_ray import exit_codes, require_ray


def embed(
    model: Annotated[Path, typer.Option(help="A GEM checkpoint; the same folder on every node.")],
    input: Annotated[
        str,
        typer.Option(
            help="What to embed: .parquet, .arrow (a folder of Dataset.save_to_disk), .jsonl, .csv "
            "or .txt (the last three also .gz); a file, a folder or a glob, local or a URI (s3://, "
            "gs:// and so on; of the Hugging Face hub, hf://datasets/ORG/NAME/...)."
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder for the vectors, local or a URI.")],
    text_column: Annotated[str, typer.Option(help="Column to embed.")] = "text",
    id_column: Annotated[
        str | None, typer.Option(help="Column that becomes `id`.", show_default="FILE:ROW")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="One more column to copy; repeatable.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the vectors: float32, float16, int8 or binary.")
    ] = "float32",
    dimensions: Annotated[
        int | None, typer.Option(help="Keep so many leading numbers.", show_default="all")
    ] = None,
    on_error: Annotated[
        str,
        typer.Option(
            help="What a bad row does: fail ends the job, skip leaves the row out, null writes it "
            "without a vector. skip and null report it in OUTPUT/_gem/errors."
        ),
    ] = "fail",
    generate: Annotated[
        str | None,
        typer.Option(help='Also answer a prompt for every row, such as "Summarise: {text}".'),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 128,
    rows_per_shard: Annotated[
        int | None,
        typer.Option(
            help="Rows of an output file; a job that goes on keeps to what it began with.",
            show_default="by the size of the input",
        ),
    ] = None,
    min_replicas: Annotated[int, typer.Option(help="Engines that are kept running.")] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(help="Engines where there is room and work.", show_default="--min-replicas"),
    ] = None,
    cpus_per_replica: Annotated[
        float | None,
        typer.Option(help="Cores of an engine.", show_default="its share; 1 with a GPU"),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of an engine.")] = 1,
    engine: Annotated[
        str, typer.Option(help="Options of the vLLM engine, as JSON: '{\"max_model_len\": 2048}'.")
    ] = "{}",
    ray_address: Annotated[
        str | None,
        typer.Option(help="A running cluster, for example auto.", show_default="this machine"),
    ] = None,
) -> None:
    """Embed a large data set, in one of several formats, into Parquet files with vectors.

    Run the same command again to go on after an interruption: what is finished stays, and every
    row comes out exactly once. Exits with 2 where the job cannot be begun, with 1 where it could
    not be finished. Prints one JSON object at the end.
    """
    require_ray("embed")
    from gem_vllm.processes import terminated_like_interrupted
    from gem_vllm.serving.job import run_embed_job
    from gem_vllm.serving.options import EmbedOptions, ReplicaOptions

    options = EmbedOptions(
        model=model,
        input=input,
        output=output,
        text_column=text_column,
        id_column=id_column,
        keep=tuple(keep or ()),
        dtype=dtype,
        dimensions=dimensions,
        on_error=on_error,
        generate=generate,
        max_tokens=max_tokens,
        rows_per_shard=rows_per_shard,
    )
    replicas = ReplicaOptions(
        min_replicas=min_replicas,
        max_replicas=min_replicas if max_replicas is None else max_replicas,
        cpus=cpus_per_replica,
        tensor_parallel=tensor_parallel_size,
        engine=json_object(engine),
        ray_address=ray_address,
    )
    # Ray has things to say while it works; standard output is the summary's alone.
    with (
        exit_codes("stopped; run the same command again to go on"),
        contextlib.redirect_stdout(sys.stderr),
        terminated_like_interrupted(),
        _Progress() as progress,
    ):
        summary = run_embed_job(options, replicas, progress.update)
    typer.echo(json.dumps(summary))


class _Progress:
    """A bar on stderr: rows, rates, time left, replicas."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("rows", total=None, rates="starting the engine")

    def __enter__(self) -> _Progress:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def update(self, state: dict[str, Any]) -> None:
        """Show what `run_embed_job` reports."""
        rows_per_s = state["rows_now"] / state["seconds"]
        left = (state["rows"] - state["rows_done"]) / rows_per_s if rows_per_s else 0.0
        rates = (
            f"{rows_per_s:,.0f} rows/s, {state['tokens_now'] / state['seconds']:,.0f} tokens/s, "
            f"{left / 60:.1f} min left, {state['replicas']} replicas"
        )
        self._progress.update(
            self._task, completed=state["rows_done"], total=state["rows"], rates=rates
        )
