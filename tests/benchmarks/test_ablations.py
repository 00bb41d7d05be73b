"""The ablations' rows are runs that can be made, and their table is whole."""

from __future__ import annotations

import gzip
import json
from argparse import Namespace
from pathlib import Path

import ablations
import pytest
from ablation_report import markdown
from ablation_rows import GROUPS, RECIPE, Row
from ablations import (
    LEAST_KEYWORDS,
    MOST_KEYWORDS,
    check_model_of_base,
    check_work,
    keywords,
    lead,
    rows_to_do,
    settings_of,
    texts_of,
)
from development import TASKS

from gem_vllm.errors import GemError
from gem_vllm.training.options import TrainOptions

ROWS = [row for rows in GROUPS.values() for row in rows]
BY_NAME = {row.name: row for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_run(row: Row, tmp_path: Path) -> None:
    options = {**RECIPE, **row.changes}
    if row.taught:
        options["teacher"] = tmp_path
    TrainOptions(base=tmp_path, data=("a.txt", "b.txt"), out=tmp_path / row.name, **options)
    assert [each.name for each in ROWS].count(row.name) == 1


def test_a_row_is_trained_on_a_tasks_own_documents(tmp_path: Path) -> None:
    args = Namespace(tasks=tmp_path, paragraphs=tmp_path / "a.txt", sentences=tmp_path / "b.txt")
    corpus = tmp_path / "Cranfield" / "corpus.jsonl.gz"
    corpus.parent.mkdir()
    for name in ("corpus.jsonl.gz", "queries.jsonl.gz", "qrels_test.jsonl.gz"):
        corpus.with_name(name).touch()
    assert texts_of(BY_NAME["words-own"], args) == [corpus]
    assert texts_of(BY_NAME["words"], args) == [args.paragraphs, args.sentences]


@pytest.mark.parametrize("cuda", [False, True])
def test_rows_for_a_gpu_are_left_out_where_there_is_none(
    cuda: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablations, "has_cuda", lambda: cuda)
    todo = [row.name for row in rows_to_do(ROWS, {"base": {}})]
    assert "base" not in todo
    assert "seed-1" in todo
    told = capsys.readouterr().out
    on_a_gpu = [
        row.name
        for group, rows in GROUPS.items()
        for row in rows
        if "on a GPU" in group or "on a GPU" in row.title
    ]
    assert len(on_a_gpu) == 5
    for name in on_a_gpu:
        assert (name in todo) == cuda
        assert (f"{name}: left out" in told) == (not cuda)


@pytest.mark.parametrize("name", ["mined", "words-taught", "words-own-taught"])
def test_a_row_that_mines_or_is_taught_wants_the_model_that_does(name: str, tmp_path: Path) -> None:
    base, row = BY_NAME["base"], BY_NAME[name]
    for todo in ([row], [row, base]):
        with pytest.raises(GemError, match=f"give --rows base {name}"):
            check_model_of_base(todo, tmp_path)
    check_model_of_base([base, row], tmp_path)
    check_model_of_base([base], tmp_path)
    (tmp_path / "base").mkdir()
    check_model_of_base([row], tmp_path)


def test_files_count_by_what_they_hold(tmp_path: Path) -> None:
    inputs = ("base", "paragraphs", "sentences", "tasks")
    for name in inputs:
        (tmp_path / name).write_text(name)
    args = Namespace(**{name: tmp_path / name for name in inputs})
    settings = settings_of(args)
    check_work(tmp_path / "work", settings)
    (tmp_path / "tasks").write_text("others, of which nothing in the work folder depends")
    check_work(tmp_path / "work", settings_of(args))
    (tmp_path / "paragraphs").write_text("others")
    with pytest.raises(GemError, match=r"is of another --paragraphs; .* another --work"):
        check_work(tmp_path / "work", settings_of(args))
    assert {name for name in inputs if settings_of(args)[name] != settings[name]} == {
        "tasks",
        "paragraphs",
    }


def test_the_table_has_what_is_done() -> None:
    results = {
        row.name: {
            "command": f"train {row.name}",
            "scores": dict.fromkeys(TASKS, 0.5),
            "dimensions": {str(size): dict.fromkeys(TASKS, 0.25) for size in row.dimensions},
            "date": "today",
            "hardware": "a CPU",
            "dtype": "float32",
            "commit": "abc",
        }
        for row in ROWS[:3]
    }
    table = markdown(results)
    for row in ROWS[:3]:
        assert f"| {row.title} | 0.5000 " in table
        assert f"train {row.name}" in table
    assert "| the first 64 numbers of these | 0.2500 " in table
    assert table.count("a CPU, float32, today, commit abc") == 1
    assert "## Positives" not in table


def test_a_paragraphs_first_sentence_and_the_rest(tmp_path: Path) -> None:
    source, out = tmp_path / "paragraphs.txt", tmp_path / "lead.jsonl.gz"
    rest = "It rose again on the next day. " * 3
    source.write_text(f"The river fell by 1.5 m. {rest}\nOne sentence alone, long as it may be.\n")
    lead(Namespace(paragraphs=source), out)
    (row,) = map(json.loads, gzip.decompress(out.read_bytes()).splitlines())
    assert row == {"anchor": "The river fell by 1.5 m.", "positive": rest.strip()}


def test_a_few_words_of_a_paragraph_the_rarer_the_likelier(tmp_path: Path) -> None:
    source, out = tmp_path / "paragraphs.txt", tmp_path / "keywords.jsonl.gz"
    common = " ".join(f"common{i}" for i in range(15))
    paragraphs = [
        f"{common}, {' '.join(f'rare{row}x{i}' for i in range(15))}." for row in range(40)
    ]
    source.write_text("\n".join([*paragraphs, common]) + "\n")  # the last has too few words
    keywords(Namespace(paragraphs=source), out)
    rows = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    assert [row["positive"] for row in rows] == paragraphs
    for row in rows:
        chosen = row["anchor"].split()
        assert LEAST_KEYWORDS <= len(chosen) <= MOST_KEYWORDS
        words = row["positive"].replace(",", "").replace(".", "").split()
        assert chosen == [word for word in words if word in chosen]  # in its order, each once
        assert all(word.startswith("rare") for word in chosen)  # what is in all tells nothing
