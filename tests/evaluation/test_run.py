"""`gem-vllm evaluate`: from a checkpoint to its tables, task by task, and on from where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gem_vllm.errors import GemError
from gem_vllm.evaluation import run as run_module
from gem_vllm.evaluation.options import EvaluateOptions, read_prompts
from gem_vllm.evaluation.run import evaluate
from tests.evaluation.conftest import TopicEmbedder

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 27,
    "max_model_len": 512,
}


@pytest.fixture(scope="module")
def options(
    tiny_checkpoint: Callable[..., Path],
    tiny_base: Callable[..., Path],
    tasks_folder: Path,
    mmlu_folder: Path,
    articles: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> EvaluateOptions:
    return EvaluateOptions(
        out=tmp_path_factory.mktemp("evaluation") / "out",
        model=str(tiny_checkpoint("llama")),
        base=tiny_base("llama"),
        local=tasks_folder,
        tasks=("Sts", "Search"),
        mmlu=str(mmlu_folder),
        perplexity=str(articles),
        engine=ENGINE,
    )


@pytest.fixture(scope="module")
def folder(options: EvaluateOptions) -> Path:
    return evaluate(options)


def test_the_tables_hold_both_models(folder: Path, options: EvaluateOptions) -> None:
    result = json.loads((folder / "results.json").read_text())
    assert list(result["embedding"]) == ["Sts", "Search"]
    assert {"base", "gem"} <= result["embedding"]["Sts"].keys()
    assert result["language"]["base"] == result["language"]["gem"]  # float32, adapter mode
    table = (folder / "results.md").read_text()
    assert f"| {options.base.name} | {Path(options.model).name} |" in table
    for text in ("| Sts | cosine_spearman (dev) |", "MMLU, 5-shot, accuracy", " ± ", "mteb 2"):
        assert text in table
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len([*(folder / "mteb" / "results").rglob("Sts.json")]) == 2
    assert len([*(folder / "lm_eval").rglob("mmlu.json")]) == 2


def test_what_is_done_is_not_done_again(
    folder: Path, options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "results.md").read_text()
    started: list[Any] = []
    monkeypatch.setattr(run_module, "MeanEmbedder", lambda *args: started.append(args))
    monkeypatch.setattr(run_module, "EngineEmbedder", lambda *args: started.append(args))
    monkeypatch.setattr(run_module, "run_language_tasks", lambda *args: started.append(args))
    evaluate(options)
    assert not started
    assert (folder / "results.md").read_text() == before


def test_another_evaluation_needs_another_folder(
    folder: Path, run_cli: Callable[..., Any], options: EvaluateOptions
) -> None:
    result = run_cli(
        *("evaluate", "--model", options.model, "--base", options.base, "--out", folder),
        *("--local", options.local, "--limit", 2, "--engine", json.dumps(ENGINE)),
    )
    assert isinstance(result.exception, GemError)
    assert "another limit" in str(result.exception)


def test_another_source_of_a_language_task_needs_another_folder(
    folder: Path, options: EvaluateOptions, tmp_path: Path
) -> None:
    other = tmp_path / "articles.txt"
    other.write_text(Path(options.perplexity).read_text() + "\n = Another = \n\n One more .\n")
    with pytest.raises(GemError, match="another perplexity"):
        evaluate(replace(options, perplexity=str(other)))


def test_what_is_not_asked_for_again_is_no_difference(
    folder: Path, options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MeanEmbedder", "EngineEmbedder", "run_language_tasks"):
        monkeypatch.setattr(run_module, name, None)
    before = (folder / "options.json").read_text()
    evaluate(replace(options, base=None, mmlu=None))
    assert (folder / "options.json").read_text() == before
    evaluate(options)  # leaves the folder's tables as the other tests expect them


def test_a_limit_marks_everything(
    options: EvaluateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "ServerEmbedder", lambda *args: TopicEmbedder())
    quick = EvaluateOptions(
        out=tmp_path / "quick",
        model="gem",
        url="http://localhost:1",
        local=options.local,
        tasks=("Sts",),
        limit=3,
    )
    evaluate(quick)
    assert "Not a result to quote: a quick look: 3" in (quick.out / "results.md").read_text()
    assert "limit" in json.loads((quick.out / "results.json").read_text())["about"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "missing"}, "missing"),
        ({"local": None, "tasks": (), "mmlu": None, "perplexity": None}, "nothing to evaluate"),
        ({"tasks": ("NoSuchTask",)}, "neither in --local"),
        ({"limit": 0}, "at least 1"),
        ({"limit": 3, "tasks": ("STS12",)}, "--limit is for tasks of --local"),
        ({"url": "http://localhost:1"}, "without --url"),
        ({"prompts": {"Nothing": "x"}}, "--prompts names Nothing"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, options: EvaluateOptions, tmp_path: Path
) -> None:
    values = {**vars(options), "out": tmp_path / "new", **change}
    with pytest.raises(GemError, match=message):
        evaluate(EvaluateOptions(**values))
    assert not (tmp_path / "new").exists()


def test_a_server_that_does_not_answer_is_named(
    run_cli: Callable[..., Any], tasks_folder: Path, tmp_path: Path
) -> None:
    result = run_cli(
        *("evaluate", "--model", "gem", "--url", "http://127.0.0.1:9", "--local", tasks_folder),
        *("--task", "Sts", "--out", tmp_path / "out"),
    )
    assert isinstance(result.exception, GemError)
    assert "does not answer" in str(result.exception)


def test_prompts_are_json_or_a_file(tmp_path: Path) -> None:
    text = '{"Retrieval-query": "Q: "}'
    (tmp_path / "prompts.json").write_text(text)
    assert read_prompts(text) == read_prompts(str(tmp_path / "prompts.json"))
    for bad in ("{", "[1]", '{"query": 1}', "no-such-file"):
        with pytest.raises(GemError, match="--prompts"):
            read_prompts(bad)
