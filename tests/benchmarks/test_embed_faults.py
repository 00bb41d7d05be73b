"""The texts that a batch job under faults embeds are those that were asked for."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from embed_faults import prepare


def test_texts_of_an_earlier_run_are_not_taken(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "model").mkdir(parents=True)
    (work / "model" / "config.json").touch()  # as of a model that is there
    (work / "texts-2.txt").write_text("cut o")
    data = tmp_path / "data.txt"
    data.write_text("one\ntwo\nthree\nfour\n")
    prepare(Namespace(work=work, data=data, rows=3, rows_of_a_round=2))
    assert (work / "texts-2.txt").read_text() == "one\ntwo\n"
    assert (work / "texts-3.txt").read_text() == "one\ntwo\nthree\n"
    assert {path.name for path in work.iterdir()} == {"model", "texts-2.txt", "texts-3.txt"}
