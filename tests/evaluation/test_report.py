"""The report of an evaluation holds what its folder holds, of several calls too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gem_vllm.evaluation import report
from gem_vllm.evaluation.options import EvaluateOptions
from gem_vllm.evaluation.report import PERPLEXITY, Column, write_report
from gem_vllm.evaluation.run import evaluate


@pytest.fixture
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base("llama")


def test_the_report_holds_what_the_folder_holds(served: EvaluateOptions, base: Path) -> None:
    evaluate(replace(served, base=base))
    evaluate(replace(served, tasks=("Search",)))
    result = json.loads((served.out / "results.json").read_text())
    assert result["titles"] == {"base": base.name, "gem": "gem"}
    assert {"base", "gem"} <= result["embedding"]["Sts"].keys()
    assert result["embedding"]["Search"].keys() & {"base", "gem"} == {"gem"}
    assert "base" in result["about"]
    table = (served.out / "results.md").read_text()
    assert f"| task | metric | {base.name} | gem | gain |" in table
    assert re.search(r"\| Sts \| cosine_spearman \(dev\) \| \S+ \| 1.0000 \| [+-]\d.\d+ \|", table)
    assert "| Search | ndcg_at_10 (test) |  | 1.0000 |  |" in table


def test_scores_of_earlier_calls_keep_where_they_are_from(
    served: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, task in (("1a", "Sts"), ("1a", "Pairs"), ("2b", "Search"), ("2b", "Sts")):
        monkeypatch.setattr(report, "source_commit", lambda commit=commit: commit)
        evaluate(replace(served, tasks=(task,)))
    result = json.loads((served.out / "results.json").read_text())
    assert result["about"]["commit"] == "2b"
    assert [call["commit"] for call in result["earlier"]] == ["1a"]
    assert re.search(
        r"\| an earlier call \| .*; 1a; .* \|", (served.out / "results.md").read_text()
    )


def test_a_score_of_other_data_is_not_beside_it(
    served: EvaluateOptions, base: Path, tmp_path: Path
) -> None:
    local = tmp_path / "tasks"
    shutil.copytree(served.local / "Sts", local / "Sts")
    served = replace(served, local=local)
    evaluate(replace(served, base=base))
    (local / "Sts" / "train.jsonl").unlink()
    evaluate(served)
    entry = json.loads((served.out / "results.json").read_text())["embedding"]["Sts"]
    assert entry.keys() & {"base", "gem"} == {"gem"}


def test_the_working_folder_has_a_name(
    served: EvaluateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert replace(served, model=".", url=None).model_name == tmp_path.name
    assert replace(served, model="team/gem").model_name == "gem"


def test_a_language_task_stays_in_the_report(served: EvaluateOptions) -> None:
    served.out.mkdir()
    perplexity = {"results": {"wikitext": {PERPLEXITY: 12.5}}}
    write_report(served, [], [Column("gem", "gem", {}, {"perplexity": perplexity})])
    before = (served.out / "results.md").read_text()
    assert "| WikiText, word perplexity | 12.5000 |" in before
    write_report(served, [], [Column("gem", "gem", {}, {})])
    assert (served.out / "results.md").read_text() == before
