"""Cosines of words, neighbourhoods, and the loss that teaches them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import Stemmer
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer

from gem_vllm.checkpoint import load_checkpoint
from gem_vllm.errors import GemError
from gem_vllm.training.lexical import (
    NEIGHBOURHOOD,
    NEIGHBOURS,
    Neighbourhoods,
    WordVectors,
    _largest,
)
from gem_vllm.training.losses import lexical_loss
from gem_vllm.training.modes import embedding_model
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run import make_trainer, train
from tests.training.conftest import losses

TEXTS = [
    "The old bridge over the river; the river runs fast.",
    "A library of old maps, and a reader of maps",
    "Bridges are built of stone",
    "Bread is baked of flour and water",
    "?!",
]


@pytest.mark.parametrize("stemmer", ["english", "none"])
def test_words_are_weighted_as_by_scikit_learn(stemmer: str) -> None:
    def words(text: str) -> list[str]:
        found = re.findall(r"\w+", text.lower())
        return Stemmer.Stemmer(stemmer).stemWords(found) if stemmer != "none" else found

    others = [*TEXTS, "a bridge that nobody knows", "unheard of", ""]
    theirs = TfidfVectorizer(analyzer=words, sublinear_tf=True).fit(TEXTS).transform(others)
    ours = WordVectors(TEXTS, stemmer).vectors(others)
    expected = torch.from_numpy((theirs @ theirs.T).toarray()).float()
    torch.testing.assert_close(torch.from_numpy((ours @ ours.T).toarray()), expected)


def test_stems_are_one_word() -> None:
    for stemmer, shared in (("english", True), ("none", False)):
        similar = Neighbourhoods(TEXTS, stemmer).similarities(["bridge", "bridges"])
        assert bool(similar[0, 1] > 0.99) == shared


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("日本語を話す、GPU", ["日本", "本語", "語を", "を話", "話す", "gpu"]),
        ("ビール abc漢", ["ビー", "ール", "abc", "漢"]),
        ("Don't_stop 3.5", ["don", "t_stop", "3", "5"]),
    ],
    ids=["marks", "no-spaces", "both", "latin"],
)
def test_what_words_are(text: str, words: list[str]) -> None:
    assert WordVectors([text], "none")._words(text) == words


def test_which_are_the_largest_does_not_depend_on_how_they_are_sorted() -> None:
    values = np.random.default_rng(0).integers(0, 9, 500).astype(np.float32)
    for count in (1, 40, 499, 500):
        expected = sorted(range(500), key=lambda place: (-values[place], place))[:count]
        assert _largest(values, count) == expected


def test_a_neighbourhood_is_a_text_and_those_that_share_its_words() -> None:
    things = ("bridge", "bread", "map")
    about = [f"{thing}, number {n}" for thing in things for n in range(NEIGHBOURS + 1)]
    texts = Neighbourhoods(about, "english")
    found = texts.draw(24, random.Random(0))
    for start in range(0, 24, NEIGHBOURHOOD):
        group = found[start : start + NEIGHBOURHOOD]
        assert len({text.split(",")[0] for text in group}) == 1
        assert len(set(group)) == NEIGHBOURHOOD
    assert found == texts.draw(24, random.Random(0)) != texts.draw(24, random.Random(1))


def test_fewer_texts_than_a_neighbourhood_has() -> None:
    found = Neighbourhoods(TEXTS[:3], "english").draw(7, random.Random(0))
    assert len(found) == 7
    assert set(found[:3]) == set(found[3:6]) == set(TEXTS[:3])


def test_the_loss_is_its_formula() -> None:
    embeddings = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    similar = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    by_hand = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        wanted = [math.exp(20.0 * float(similar[i, j])) for j in others]
        found = [math.exp(20.0 * float(embeddings[i] @ embeddings[j])) for j in others]
        for w, f in zip(wanted, found, strict=True):
            share = w / sum(wanted)
            by_hand += share * math.log(share / (f / sum(found)))
    loss = lexical_loss(embeddings, similar.fill_diagonal_(-torch.inf))
    assert float(loss) == pytest.approx(by_hand / 4, rel=1e-4)
    itself = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    assert float(lexical_loss(embeddings, itself)) == pytest.approx(0.0, abs=1e-5)


def test_training_learns_it(options: TrainOptions) -> None:
    options = dataclasses.replace(
        options,
        alpha=1.0,
        lexical_share=1.0,
        steps=30,
        save_every=30,
        batch_size=32,
        contrastive_learning_rate=1e-2,
    )
    train(options, progress=False)
    found = losses(options)
    assert found.keys() == {"loss_lex"}
    assert sum(found["loss_lex"][-5:]) < 0.8 * sum(found["loss_lex"][:5])
    card = (options.out / "README.md").read_text()
    assert "| Lexical loss | " in card
    assert "--lexical-share 1.0" in card


@pytest.mark.parametrize("rows_per_pass", [None, 3])
def test_a_teacher_counts_as_much_as_the_words(
    rows_per_pass: int | None, options: TrainOptions, tmp_path: Path
) -> None:
    options = dataclasses.replace(options, rows_per_pass=rows_per_pass)
    train(options, progress=False)
    taught = dataclasses.replace(
        options, out=tmp_path / "taught", alpha=1.0, lexical_share=1.0, teacher=options.out, seed=1
    )
    trainer, _, _ = make_trainer(taught, progress=False)
    model, batch = trainer.model, next(iter(trainer.train_dataset))
    teacher = load_checkpoint(options.out, dtype=torch.float32)
    own = model.embed(batch["lex_ids"], batch["lex_lengths"])
    its = embedding_model(teacher[0], teacher[2]).embed(batch["lex_ids"], batch["lex_lengths"])
    both = 0.5 * (batch["lex_similar"] + its @ its.T)
    torch.testing.assert_close(model(**batch)["loss_lex"], lexical_loss(own, both))
    assert [n for n in model.state_dict() if "teacher" in n] == []
    train(taught, progress=False)
    assert losses(taught).keys() == {"loss_lex"}
    assert "--teacher gem" in (taught.out / "README.md").read_text()


def test_prefixes_are_shared_with_an_adapter_of_the_same_base(
    options: TrainOptions, tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Another base of the same vocabulary, or one that was trained itself, has its own."""
    bases = {"same": options.base, "reseeded": tiny_base(seed=1), "full": options.base}
    for name, base in bases.items():
        mode = "full" if name == "full" else "adapter"
        its = dataclasses.replace(options, base=base, out=tmp_path / name, mode=mode)
        train(its, progress=False)
        taught = dataclasses.replace(
            options, out=tmp_path / "taught", alpha=1.0, lexical_share=1.0, teacher=its.out
        )
        trainer, _, _ = make_trainer(taught, progress=False)
        model, batch = trainer.model, next(iter(trainer.train_dataset))
        assert model.teacher.same_prefixes == (name == "same")
        lm, _, gem_config = load_checkpoint(its.out, dtype=torch.float32)
        taught_by = embedding_model(lm, gem_config).embed(batch["lex_ids"], batch["lex_lengths"])
        both = 0.5 * (batch["lex_similar"] + taught_by @ taught_by.T)
        own = model.embed(batch["lex_ids"], batch["lex_lengths"])
        torch.testing.assert_close(model(**batch)["loss_lex"], lexical_loss(own, both))


def test_a_teacher_that_reads_otherwise_is_refused(options: TrainOptions, tmp_path: Path) -> None:
    taught = dataclasses.replace(options, out=tmp_path / "taught", lexical_share=0.5)
    with pytest.raises(GemError, match="nothing is not a folder; name a GEM checkpoint"):
        train(dataclasses.replace(taught, teacher=tmp_path / "nothing"), progress=False)
    with pytest.raises(GemError, match="gem_config"):
        train(dataclasses.replace(taught, teacher=options.base), progress=False)
    train(options, progress=False)
    taught = dataclasses.replace(taught, teacher=options.out)
    with pytest.raises(GemError, match="has another instruction"):
        train(dataclasses.replace(taught, instruction=" in a word:"), progress=False)
    renamed = tmp_path / "renamed"
    shutil.copytree(options.out, renamed)
    file = renamed / "tokenizer.json"
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(GemError, match="has another vocabulary"):
        train(dataclasses.replace(taught, teacher=renamed), progress=False)
    with pytest.raises(GemError, match="--lexical-share"):
        dataclasses.replace(taught, lexical_share=0.0)
    with pytest.raises(GemError, match="without --shard"):
        dataclasses.replace(taught, shard=True)
    assert not taught.out.exists()


def test_bad_options_are_refused(options: TrainOptions) -> None:
    with pytest.raises(GemError, match="--stemmer must be one of none, "):
        dataclasses.replace(options, stemmer="klingon")
    with pytest.raises(GemError, match="--lexical-share must be from 0 to 1"):
        dataclasses.replace(options, lexical_share=1.5)
    with pytest.raises(GemError, match="needs a --batch-size of at least 8"):
        dataclasses.replace(options, lexical_share=0.5, batch_size=4)
