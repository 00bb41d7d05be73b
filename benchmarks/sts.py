"""STS Benchmark: Spearman's correlation of cosine similarity with human scores.

    python benchmarks/sts.py --data DIR --checkpoint DIR             # transformers, float32
    python benchmarks/sts.py --data DIR --url http://localhost:8000 --model NAME   # a server
    python benchmarks/sts.py --data DIR --checkpoint BASE --baseline mean

``--data`` is a folder with ``dev.jsonl.gz`` (``--split``), one object a line with ``sentence1``,
``sentence2`` and ``score``. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import httpx
import torch
import torch.nn.functional as F

from gem_vllm.errors import GemError
from gem_vllm.training.held_out import read_scored_pairs, spearman

REQUEST_TEXTS = 64


def main() -> None:
    """Read the pairs, embed both sides, print the correlation."""
    args = parse_arguments()
    pairs = read_pairs(args.data / f"{args.split}.jsonl.gz", args.pairs)
    texts = [pair[side] for side in ("sentence1", "sentence2") for pair in pairs]
    if args.url:
        how, embeddings = "server", embed_by_server(args.url, args.model, texts)
    elif args.baseline:
        how, embeddings = "mean pooling of the base", embed_by_mean(args.checkpoint, texts)
    else:
        how, embeddings = "reference", embed_by_reference(args.checkpoint, texts)
    first, second = F.normalize(embeddings, dim=-1).chunk(2)
    cosine = (first * second).sum(dim=-1)
    score = spearman(cosine, torch.tensor([pair["score"] for pair in pairs]))
    print(json.dumps({"split": args.split, "pairs": len(pairs), "by": how, "spearman": score}))


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with 2 where it is incomplete."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dev.jsonl.gz")
    parser.add_argument("--split", default="dev", help="which file of it")
    parser.add_argument("--pairs", type=int, help="take this many, evenly spread (default: all)")
    parser.add_argument("--checkpoint", type=Path, help="GEM checkpoint, or a base for --baseline")
    parser.add_argument("--baseline", choices=["mean"], help="mean-pooled last hidden states")
    parser.add_argument("--url", help="of a server with /v1/embeddings")
    parser.add_argument("--model", help="the model's name on that server")
    args = parser.parse_args()
    if bool(args.url) == bool(args.checkpoint):
        parser.error("give --checkpoint, or --url with --model")
    if args.url and (not args.model or args.baseline):
        parser.error("--url needs --model, and has no --baseline")
    return args


def read_pairs(file: Path, limit: int | None) -> list[dict]:
    """The pairs of a split, or ``limit`` of them, evenly spread."""
    if not file.is_file():
        raise GemError(f"{file} is missing; --data names the folder that holds it")
    pairs = read_scored_pairs(file)
    if limit is None or limit >= len(pairs):
        return pairs
    return [pairs[i * len(pairs) // limit] for i in range(limit)]


def embed_by_reference(checkpoint: Path, texts: list[str]) -> torch.Tensor:
    """Embeddings [n, d] by ``gem_vllm.reference``, in float32."""
    from gem_vllm.reference import ReferenceEmbedder

    return ReferenceEmbedder(checkpoint, dtype=torch.float32).embed(texts)


@torch.inference_mode()
def embed_by_mean(base: Path, texts: list[str]) -> torch.Tensor:
    """Mean of the base's last hidden states over a text's tokens: [n, hidden], float32."""
    from gem_vllm.checkpoint import load_base

    model, tokenizer = load_base(base, dtype=torch.float32)
    decoder = model.get_decoder()
    rows = [
        decoder(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(dim=0)
        for text in texts
    ]
    return torch.stack(rows)


def embed_by_server(url: str, model: str, texts: list[str]) -> torch.Tensor:
    """Embeddings [n, d] by ``POST /v1/embeddings``."""
    rows: list[list[float]] = []
    with httpx.Client(base_url=url, timeout=600) as client:
        for start in range(0, len(texts), REQUEST_TEXTS):
            request = {"model": model, "input": texts[start : start + REQUEST_TEXTS]}
            reply = client.post("/v1/embeddings", json=request)
            if reply.is_error:
                raise GemError(f"{url} answered {reply.status_code}: {reply.text[:300]}")
            data = sorted(reply.json()["data"], key=lambda item: item["index"])
            rows += [item["embedding"] for item in data]
    return torch.tensor(rows)


if __name__ == "__main__":
    try:
        main()
    except GemError as error:
        raise SystemExit(f"error: {error}") from None
