"""What is exported loads in sentence-transformers itself, with the reference's vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from gem_vllm.errors import GemError
from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.sentence_transformer import export

TEXTS = ["bread", "In 1969 the first people walked on the moon.", "an old stone bridge " * 9]


@pytest.mark.parametrize(
    ("family", "mode", "pooling"),
    [("llama", "adapter", "mean"), ("gemma3", "adapter", "concat"), ("qwen3", "full", "mean")],
)
def test_the_references_vectors(
    family: str, mode: str, pooling: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(family, k=3, train_mode=mode, pooling=pooling)
    export(checkpoint, tmp_path / "st")
    model = SentenceTransformer(str(tmp_path / "st"), trust_remote_code=True, device="cpu")
    found = model.encode(TEXTS)
    expected = ReferenceEmbedder(checkpoint).embed(TEXTS).numpy()
    assert (found * expected).sum(axis=1).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    assert model.get_embedding_dimension() == found.shape[1]
    assert model.similarity(found[:1], found[:1]).item() == pytest.approx(1.0, abs=1e-5)


def test_an_instruction_goes_behind_every_text(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("llama", instruction_ids=(70, 71, 72))
    export(checkpoint, tmp_path / "st")
    model = SentenceTransformer(str(tmp_path / "st"), trust_remote_code=True, device="cpu")
    expected = ReferenceEmbedder(checkpoint).embed(TEXTS).numpy()
    assert (model.encode(TEXTS) * expected).sum(axis=1).min() >= 0.9999
    without = ReferenceEmbedder(tiny_checkpoint("llama")).embed(TEXTS).numpy()
    assert (without * expected).sum(axis=1).max() < 0.999


def test_threads_get_the_vectors_of_one(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    export(tiny_checkpoint("llama"), tmp_path / "st")
    model = SentenceTransformer(str(tmp_path / "st"), trust_remote_code=True, device="cpu")
    texts = TEXTS * 8
    expected = model.encode(texts)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(model.encode, [texts] * 16):
            assert (found * expected).sum(axis=1).min() >= 0.9999
    np.testing.assert_array_equal(model.encode(texts), expected)


@pytest.mark.parametrize("where", ["again", "st"], ids=["elsewhere", "where-it-is"])
def test_saved_by_sentence_transformers_it_loads_again(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, where: str
) -> None:
    export(tiny_checkpoint("llama"), tmp_path / "st")
    model = SentenceTransformer(str(tmp_path / "st"), trust_remote_code=True, device="cpu")
    model.save(str(tmp_path / where))
    again = SentenceTransformer(str(tmp_path / where), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(model.encode(TEXTS), again.encode(TEXTS))


def test_prompts_dtypes_and_long_texts(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    export(tiny_checkpoint("llama"), tmp_path / "st")
    model = SentenceTransformer(
        str(tmp_path / "st"),
        trust_remote_code=True,
        device="cpu",
        model_kwargs={"dtype": "bfloat16"},
    )
    assert model.dtype == torch.bfloat16
    assert model.max_seq_length == 512 - 3 - 1
    frequencies = [each for name, each in model.named_buffers() if name.endswith("inv_freq")]
    assert {each.dtype for each in frequencies} == {torch.float32}
    reference = ReferenceEmbedder(tiny_checkpoint("llama"), dtype=torch.bfloat16)
    expected = reference.embed(TEXTS).numpy()
    assert (model.encode(TEXTS) * expected).sum(axis=1).min() >= 0.999
    with_prompt = model.encode(["bread"], prompt="a query: ")
    np.testing.assert_array_equal(with_prompt, model.encode(["a query: bread"]))
    model.max_seq_length = 8
    long = model.encode(["an old stone bridge " * 50])
    assert np.isfinite(long).all()


@pytest.mark.parametrize("family", ["qwen3", "llama"], ids=["no-bos", "bos"])
def test_texts_that_the_engine_refuses_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    export(tiny_checkpoint(family), tmp_path / "st")
    model = SentenceTransformer(str(tmp_path / "st"), trust_remote_code=True, device="cpu")
    with pytest.raises(GemError, match="special token"):
        model.encode(["what is <|gem_1|>"])
    with pytest.raises(GemError, match="empty"):
        model.encode([""])


def test_folders_that_are_no_part_of_a_checkpoint_are_left_behind(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "gem")
    (checkpoint / ".cache" / "huggingface").mkdir(parents=True)
    for _ in range(2):
        export(checkpoint, tmp_path / "st")
    found = {path.name for path in (tmp_path / "st").iterdir() if path.is_dir()}
    assert found == {"gem_adapter"}


def test_other_folders_are_refused(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(GemError, match="gem_config"):
        export(tiny_base("llama"), tmp_path / "st")
    assert not (tmp_path / "st").exists()
