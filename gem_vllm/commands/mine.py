"""``gem-vllm mine``: hard negatives for training, from the vectors of a batch job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def mine(
    vectors: Annotated[
        Path, typer.Argument(help="Folder that `gem-vllm embed --keep TEXT_COLUMN` has written.")
    ],
    out: Annotated[Path, typer.Option(help="New file to write (.jsonl, .jsonl.gz), for --pairs.")],
    text_column: Annotated[str, typer.Option(help="Column with the texts.")] = "text",
    negatives: Annotated[int, typer.Option(help="For each text.")] = 4,
    range_min: Annotated[
        int, typer.Option(help="Pass over so many nearest neighbours: they may say the same.")
    ] = 10,
    range_max: Annotated[int, typer.Option(help="Draw from the neighbours up to this one.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Find texts that a model takes for near, to be told apart in training.

    Embed the training text with a checkpoint, mine, and train again with what came out:

    gem-vllm embed --model my-model --input texts.txt --keep text --output vectors

    gem-vllm mine vectors --out negatives.jsonl

    gem-vllm train --base my-base --data texts.txt --pairs negatives.jsonl --out better
    """
    from tqdm import tqdm

    from gem_vllm.training.mining import MineOptions
    from gem_vllm.training.mining import mine as mine_negatives

    options = MineOptions(
        vectors=vectors,
        out=out,
        text_column=text_column,
        negatives=negatives,
        range_min=range_min,
        range_max=range_max,
        seed=seed,
    )
    with tqdm(unit=" texts") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        lines = mine_negatives(options, progress)
    typer.echo(f"{out}: {lines} texts with {negatives} negatives each")
