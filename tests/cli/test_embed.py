"""`gem-vllm embed` at its door: what is refused, with which words, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gem_vllm import cli


@pytest.fixture
def run(
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Run the command with good arguments, changed as told; exit code and standard error."""
    (tmp_path / "in.jsonl").write_text('{"text": "a river", "n": 1}\n')

    def run_command(**changes: str) -> tuple[int, str]:
        arguments = {
            "model": str(tiny_checkpoint("llama", k=2)),
            "input": str(tmp_path / "in.jsonl"),
            "output": str(tmp_path / "out"),
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        flat = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        monkeypatch.setattr("sys.argv", ["gem-vllm", "embed", *flat])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not (tmp_path / "out").exists()
        return int(stop.value.code or 0), capsys.readouterr().err

    return run_command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no-such-folder"}, "name the folder of a GEM checkpoint"),
        ({"input": "no-such-file.jsonl"}, "cannot be read"),
        ({"input": "text.docx"}, "cannot be read"),
        ({"text_column": "body"}, "has no column 'body'; its columns are: text, n"),
        ({"id_column": "key"}, "has no column 'key'"),
        ({"keep": "embedding"}, "the output has this column already"),
        ({"dtype": "int4"}, "--dtype is 'int4'; it must be one of: float32, float16, int8, binary"),
        ({"dimensions": "65"}, "--dimensions is 65; embeddings here have 1 to 64"),
        ({"on_error": "ignore"}, "--on-error is 'ignore'"),
        ({"generate": "Summarise."}, "names no column"),
        ({"generate": "Summarise {text"}, "write a brace of the text twice"),
        ({"generate": "Summarise {} {text}"}, "name a column in its braces"),
        ({"generate": "Summarise {text:{width}}"}, "name a column in its braces"),
        ({"generate": "Summarise {body}"}, "has no column 'body'"),
        ({"max_tokens": "0"}, "--max-tokens is 0"),
        ({"rows_per_shard": "0"}, "--rows-per-shard is 0"),
        ({"min_replicas": "0"}, "--min-replicas 0"),
        ({"min_replicas": "2", "max_replicas": "1"}, "--min-replicas 2 --max-replicas 1"),
        ({"cpus_per_replica": "0.5"}, "--cpus-per-replica is 0.5"),
        ({"tensor_parallel_size": "0"}, "--tensor-parallel-size is 0"),
        ({"engine": "{"}, "--engine is not JSON"),
        ({"engine": "[]"}, "--engine is not a JSON object"),
        ({"engine": '{"model": "x"}'}, "give it as --model"),
        ({"output": "nofs://x"}, "cannot be used"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_2(
    changes: dict[str, str], message: str, run: Callable[..., tuple[int, str]]
) -> None:
    code, printed = run(**changes)
    assert code == 2
    assert message in printed.splitlines()[-1]
    assert printed.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(("spec", "output"), [("", "out"), ("/**", "x/../out")])
def test_an_output_within_the_input_is_refused(
    spec: str, output: str, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, printed = run(input=f"{tmp_path}{spec}", output=f"{tmp_path}/{output}")
    assert (code, "what is written would be read" in printed) == (2, True)


def test_a_base_model_is_refused(
    run: Callable[..., tuple[int, str]], tiny_base: Callable[..., Path]
) -> None:
    code, printed = run(model=str(tiny_base()))
    assert (code, "make one with: gem-vllm train" in printed) == (2, True)
