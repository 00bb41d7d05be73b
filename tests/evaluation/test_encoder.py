"""mteb's encoder protocol: order, prompts, one vector for one text; and the base's mean pooling."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from transformers import AutoTokenizer

from gem_vllm.checkpoint import load_base
from gem_vllm.errors import GemError
from gem_vllm.evaluation.encoder import GemEncoder, ServerEmbedder
from gem_vllm.evaluation.mean_pooling import MeanEmbedder
from tests.evaluation.conftest import TopicEmbedder

TASK = SimpleNamespace(name="Some", type="Retrieval")


def encode(encoder: GemEncoder, texts: list[list[str]], prompt_type=None) -> np.ndarray:
    return encoder.encode(
        [{"text": batch} for batch in texts],
        task_metadata=TASK,
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
    )


def test_a_text_is_embedded_once_and_keeps_its_place(topic_embedder: TopicEmbedder) -> None:
    encoder = GemEncoder(topic_embedder, "topics", "1")
    assert isinstance(encoder, EncoderProtocol)
    first = encode(encoder, [["moon", "bread"], ["moon"]])
    again = encode(encoder, [["bread", "river"]])
    assert topic_embedder.calls == [["moon", "bread"], ["river"]]
    np.testing.assert_array_equal(first[[0, 1]], [first[2], again[0]])
    assert first[0].argmax() == 2
    encoder.forget()
    encode(encoder, [["river"]])
    assert topic_embedder.calls[2:] == [["river"]]


def test_prompts_go_before_texts_by_kind(topic_embedder: TopicEmbedder) -> None:
    prompts = {"Retrieval-query": "Q: ", "Other": "no: "}
    encoder = GemEncoder(topic_embedder, "topics", "1", prompts)
    encode(encoder, [["moon"]], PromptType.query)
    encode(encoder, [["moon"]], PromptType.document)
    assert topic_embedder.calls == [["Q: moon"], ["moon"]]
    assert encoder.mteb_model_meta.use_instructions


def test_an_empty_text_does_not_stop_a_benchmark(topic_embedder: TopicEmbedder) -> None:
    encode(GemEncoder(topic_embedder, "topics", "1"), [["", "moon"]])
    assert topic_embedder.calls == [[" ", "moon"]]


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (200, "<html>\n<p>Welcome</p>\n</html>", "answered 200 without embeddings: <html> <p>Wel"),
        (200, '{"object": "ok"}', "answered 200 without embeddings: {.*}; give the address of"),
        (200, '["data"]', ".* without embeddings"),
        (200, '{"data": []}', ".* without embeddings"),
        (200, '{"data": [{"index": 0, "embedding": null}]}', ".* without embeddings"),
        (200, '{"data": [{"index": 0, "embedding": "AAAA"}]}', ".* without embeddings"),
        (502, "<html>\nBad gateway</html>", "answered 502: <html> Bad gateway</html>"),
    ],
)
def test_what_is_no_embedding_server_is_told_in_a_line(
    status: int, answer: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response = httpx.Response(status, text=answer)
    monkeypatch.setattr(httpx.Client, "post", lambda *args, **kwargs: response)
    with pytest.raises(GemError, match=f"--url http://localhost:1 {message}") as raised:
        ServerEmbedder("http://localhost:1", "gem").embed(["a"])
    assert "\n" not in str(raised.value)


def test_a_servers_vectors_are_in_the_order_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [{"index": 1, "embedding": [0.0, 1.0]}, {"index": 0, "embedding": [1.0, 0.0]}]
    response = httpx.Response(200, json={"data": data})
    monkeypatch.setattr(httpx.Client, "post", lambda *args, **kwargs: response)
    found = ServerEmbedder("http://localhost:1", "gem").embed(["a", "b"])
    assert (found.dtype, found.tolist()) == (np.float32, [[1.0, 0.0], [0.0, 1.0]])


def test_mean_pooling_in_batches_is_that_of_each_text_alone(
    tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    # With a layer of a sliding window; and whatever the tokenizer's own side is.
    base = shutil.copytree(tiny_base("gemma3"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.truncation_side = "left"
    tokenizer.save_pretrained(base)
    model, tokenizer = load_base(base, dtype=torch.float32)
    texts = ["bread", "In 1969 the first people walked on the moon. " * 4, "an old stone bridge"]
    embedder = MeanEmbedder(base, 40)
    assert embedder._tokenizer.truncation_side == "right"
    found = embedder.embed(texts)
    assert embedder.tokens == sum(min(40, len(tokenizer(text)["input_ids"])) for text in texts)
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:40]])
        with torch.inference_mode():
            states = model.get_decoder()(ids).last_hidden_state[0]
        np.testing.assert_allclose(row, states.mean(dim=0).numpy(), atol=1e-5)
