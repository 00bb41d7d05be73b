"""`gem-vllm evaluate`: from a checkpoint to its tables, task by task, and on from where it was."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from mteb.mocks.mock_tasks.sts import MockMultilingualSTSTask

from gem_vllm import cli
from gem_vllm.errors import GemError
from gem_vllm.evaluation import measurements
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
    table = (folder / "results.md").read_text(encoding="utf-8")
    assert f"| {options.base.name} | {Path(options.model).name} |" in table
    for text in (
        "| Sts | cosine_spearman (dev) |",
        "MMLU, 5-shot, accuracy",
        " ± ",
        "| MMLU, 5-shot, prompts cut at their start | 0 | 0 |",
        "mteb 2",
    ):
        assert text in table
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len([*(folder / "mteb" / "results").rglob("Sts.json")]) == 2
    assert len([*(folder / "lm_eval").rglob("mmlu.json")]) == 2


def test_what_is_done_is_not_done_again(
    folder: Path, options: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "results.md").read_text()
    started: list[Any] = []
    monkeypatch.setattr(measurements, "MeanEmbedder", lambda *args: started.append(args))
    monkeypatch.setattr(measurements, "EngineEmbedder", lambda *args: started.append(args))
    monkeypatch.setattr(measurements, "run_language_tasks", lambda *args: started.append(args))
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
        monkeypatch.setattr(measurements, name, None)
    before = (folder / "options.json").read_text()
    evaluate(replace(options, base=None, mmlu=None))
    assert (folder / "options.json").read_text() == before
    evaluate(options)  # leaves the folder's tables as the other tests expect them


def test_a_result_that_is_half_written_is_measured_again(served: EvaluateOptions) -> None:
    (result,) = (evaluate(served) / "mteb" / "results").rglob("Sts.json")
    whole = json.loads(result.read_text())["scores"]
    result.write_text(result.read_text()[:100])
    evaluate(served)
    assert json.loads(result.read_text())["scores"] == whole


def test_a_full_disk_is_told_in_a_line(
    served: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mteb, "evaluate", fail)
    with pytest.raises(GemError, match=r"the disk of .* is full; what is done is kept"):
        evaluate(served)


def test_a_limit_marks_everything(served: EvaluateOptions) -> None:
    quick = replace(served, limit=3)
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
        ({"engine": {"model": "another"}}, "--engine cannot set model"),
        ({"prompts": {"Nothing": "x"}}, "--prompts names Nothing"),
        ({"out": Path("o" * 300)}, "is too long; choose a shorter one"),
        ({"url": "http://localhost:80o0", "mmlu": None, "perplexity": None}, "is no address"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, options: EvaluateOptions, tmp_path: Path
) -> None:
    values = {**vars(options), "out": tmp_path / "new", **change}
    with pytest.raises(GemError, match=message):
        evaluate(EvaluateOptions(**values))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["model", "base", "local", "mmlu"])
def test_results_are_not_written_into_what_they_are_of(
    source: str, options: EvaluateOptions
) -> None:
    folder = Path(getattr(options, source))
    with pytest.raises(GemError, match=f"--out .* is in {folder}, which is read"):
        evaluate(replace(options, out=folder / "results"))
    assert not (folder / "results").exists()


def test_a_short_context_is_the_engines_length(options: EvaluateOptions, tmp_path: Path) -> None:
    plain = replace(options, engine={})
    known = json.loads((Path(options.model) / "config.json").read_text())
    assert plain.engine_options()["max_model_len"] == known["max_position_embeddings"] < 2048
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 4096}')
    long = replace(plain, model=str(tmp_path), base=None)
    assert long.engine_options()["max_model_len"] == 2048
    assert replace(plain, engine={"max_model_len": 64}).engine_options()["max_model_len"] == 64


def test_mmlu_of_the_hub_is_bound_to_its_shots(options: EvaluateOptions) -> None:
    assert replace(options, mmlu="hub").bound()["mmlu"] == "hub, 5-shot"


def test_data_that_cannot_be_loaded_stop_it_before_anything_is_started(
    options: EvaluateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(measurements, "MeanEmbedder", pytest.fail)
    monkeypatch.setattr(MockMultilingualSTSTask, "load_data", fail)
    monkeypatch.setattr(mteb, "get_task", lambda name: MockMultilingualSTSTask())
    monkeypatch.setattr("gem_vllm.evaluation.language.TaskManager", fail)
    mock = replace(options, out=tmp_path / "mock", tasks=("Mock",), mmlu=None, perplexity=None)
    with pytest.raises(GemError, match="--task MockMultilingualSTSTask cannot be loaded: no netw"):
        evaluate(mock)
    with pytest.raises(GemError, match="data of --mmlu hub cannot be loaded: no network"):
        evaluate(replace(options, out=tmp_path / "hub", mmlu="hub"))


def test_a_task_of_several_parts_goes_on_with_those_that_are_missing(
    served: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[str] = []
    evaluate_part = MockMultilingualSTSTask._evaluate_subset

    def evaluate_some(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(parts) == 1:
            parts.append("interrupted")
            raise KeyboardInterrupt
        parts.append(kwargs["hf_subset"])
        return evaluate_part(self, *args, **kwargs)

    monkeypatch.setattr(MockMultilingualSTSTask, "_evaluate_subset", evaluate_some)
    monkeypatch.setattr(mteb, "get_task", lambda name: MockMultilingualSTSTask())
    mock = replace(served, tasks=("Mock",))
    with pytest.raises(KeyboardInterrupt):
        evaluate(mock)
    evaluate(mock)
    first, _, second = parts
    assert {first, second} == set(MockMultilingualSTSTask().hf_subsets)


def test_of_a_server_only_what_is_known_is_told(served: EvaluateOptions) -> None:
    evaluate(served)
    about = json.loads((served.out / "results.json").read_text())["about"]
    assert about.keys() >= {"client's hardware", "client's versions"}
    assert about.keys().isdisjoint({"engine", "hardware", "versions"})


def test_another_checkpoint_behind_a_url_needs_another_folder(
    served: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(served)
    evaluate(served)
    monkeypatch.setattr(TopicEmbedder, "embed", lambda self, texts: np.eye(len(texts), 4))
    with pytest.raises(GemError, match="another checkpoint behind --url"):
        evaluate(served)


def test_a_server_that_does_not_answer_is_one_line_and_status_2(
    tasks_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["gem-vllm", "evaluate", "--model", "gem", "--url", "http://127.0.0.1:9"]
    options = ["--local", str(tasks_folder), "--task", "Sts", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "does not answer" in last


def test_a_missing_package_is_named(
    run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run_cli("evaluate", "--model", "gem", "--out", "out")
    assert isinstance(result.exception, GemError)
    assert "(import of lm_eval halted" in str(result.exception)


def test_prompts_are_json_or_a_file(tmp_path: Path) -> None:
    text = '{"Retrieval-query": "Q: "}'
    (tmp_path / "prompts.json").write_text(text)
    assert read_prompts(text) == read_prompts(str(tmp_path / "prompts.json"))
    long = {"query": "Q" * 300}
    assert read_prompts(f" {json.dumps(long)}") == long
    (tmp_path / "latin.json").write_bytes(b'{"query": "caf\xe9: "}')
    bad_ones = ("{", "[1]", '{"query": 1}', "no-such-file", "n" * 300, str(tmp_path / "latin.json"))
    for bad in bad_ones:
        with pytest.raises(GemError, match="--prompts"):
            read_prompts(bad)
