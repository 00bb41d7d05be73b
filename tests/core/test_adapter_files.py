"""The adapter alone: out of a checkpoint, into PEFT, back onto its base."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from gem_vllm.adapter_files import apply_adapter, extract_adapter
from gem_vllm.checkpoint import add_special_tokens, load_base, load_checkpoint
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemConfigError, GemError
from gem_vllm.reference import ReferenceEmbedder
from tests.tiny import FAMILIES, make_tiny_base, make_tiny_checkpoint

TEXTS = ["Paris is the capital of France.", "Bread is made from flour"]


@pytest.mark.parametrize("family", FAMILIES)
def test_extract_and_apply_give_the_same_bytes(family, tiny_base, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(family), tmp_path / "gem")
    (folder / "README.md").write_text("# A model card\n")
    extract_adapter(folder, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "gem_config.json",
    }
    apply_adapter(tiny_base(family), tmp_path / "adapter", tmp_path / "again")
    for file in (path for path in folder.rglob("*") if path.is_file()):
        again = tmp_path / "again" / file.relative_to(folder)
        assert again.read_bytes() == file.read_bytes(), file


def test_transformers_generates_no_special_token_of_a_base_without_a_generation_config(
    tiny_base, tiny_checkpoint, tmp_path
):
    base = shutil.copytree(tiny_base("llama"), tmp_path / "base")
    (base / "generation_config.json").unlink()
    extract_adapter(tiny_checkpoint("llama"), tmp_path / "adapter")
    apply_adapter(base, tmp_path / "adapter", tmp_path / "gem")
    written = GenerationConfig.from_pretrained(tmp_path / "gem")
    config = GemConfig.from_pretrained(tmp_path / "gem")
    assert written.suppress_tokens == sorted(config.special_token_ids)
    plain = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(written, name) == getattr(plain, name)


def test_embeddings_are_the_same(tiny_base, tiny_checkpoint, tmp_path):
    extract_adapter(tiny_checkpoint(), tmp_path / "adapter")
    apply_adapter(tiny_base(), tmp_path / "adapter", tmp_path / "again")
    before, after = (
        ReferenceEmbedder(folder).embed(TEXTS) for folder in (tiny_checkpoint(), tmp_path / "again")
    )
    assert torch.equal(before, after)


@pytest.mark.parametrize("place", [".", "adapter"])
def test_nothing_is_written_into_what_is_read(place, tiny_base, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    before = sorted(folder.rglob("*"))
    with pytest.raises(GemError, match=r"is in .*, which is read; choose a folder beside it"):
        extract_adapter(folder, folder / place)
    assert sorted(folder.rglob("*")) == before
    extract_adapter(folder, tmp_path / "adapter")
    for source in (tiny_base(), tmp_path / "adapter"):
        with pytest.raises(GemError, match="which is read"):
            apply_adapter(tiny_base(), tmp_path / "adapter", source / place)


@pytest.mark.parametrize("spare_rows", [1, 2, 9])
def test_base_with_spare_rows(spare_rows, tmp_path):
    """The special tokens take some rows that the base has and does not use."""
    base = make_tiny_base("qwen2", tmp_path / "base", vocab_size=512 + spare_rows)
    folder = make_tiny_checkpoint("qwen2", tmp_path / "gem", k=2, base=base)
    extract_adapter(folder, tmp_path / "adapter")
    apply_adapter(base, tmp_path / "adapter", tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (folder / weights).read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_peft_loads_it(family, tiny_base, tiny_checkpoint, tmp_path):
    """PEFT itself, on the base with its tokens added: the rows and the LoRA of the checkpoint."""
    folder = tiny_checkpoint(family)
    extract_adapter(folder, tmp_path / "adapter")
    base, tokenizer = load_base(tiny_base(family), dtype=torch.float32)
    ids = add_special_tokens(base, tokenizer, GemConfig.from_pretrained(folder).k)
    from_adapter = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    from_checkpoint, _, _ = load_checkpoint(folder, dtype=torch.float32)
    token_ids = torch.tensor([[5, 300, 20, *ids]])
    with torch.inference_mode():
        ours, theirs = (
            model(token_ids).logits[..., :512] for model in (from_checkpoint, from_adapter)
        )
    torch.testing.assert_close(ours, theirs)
    with from_checkpoint.disable_adapter(), torch.inference_mode():
        assert (from_checkpoint(token_ids).logits[..., :512] - ours).abs().max() > 0.1


def test_extract_refuses(tiny_base, tiny_checkpoint, tmp_path):
    with pytest.raises(GemConfigError, match="has no gem_config"):
        extract_adapter(tiny_base(), tmp_path / "adapter")
    with pytest.raises(GemConfigError, match="only a checkpoint of train_mode 'adapter'"):
        extract_adapter(tiny_checkpoint(train_mode="full"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def adapter(tiny_checkpoint, tmp_path):
    extract_adapter(tiny_checkpoint(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("mistral", {}, "architecture LlamaForCausalLM, and .* has MistralForCausalLM"),
        ("llama", {"hidden_size": 32}, "hidden size 64, and .* has 32"),
        ("llama", {"vocab_size": 520}, "vocabulary size 512, and .* has 520"),
        ("llama", {"seed": 1}, "are not those that the adapter was trained on"),
        ("llama", {"num_hidden_layers": 1}, "are not those that the adapter was trained on"),
    ],
)
def test_apply_refuses_another_base(family, options, says, tiny_base, adapter, tmp_path):
    with pytest.raises(GemConfigError, match=says):
        apply_adapter(tiny_base(family, **options), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_apply_refuses_a_broken_adapter(tiny_base, adapter, tmp_path):
    def refused():
        with pytest.raises(GemConfigError) as caught:
            apply_adapter(tiny_base(), adapter, tmp_path / "out")
        return str(caught.value)

    file = adapter / "gem_config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in whole.items() if k != "base_sha256"}))
    assert "lacks base_sha256" in refused()
    file.write_text(json.dumps(whole | {"special_token_ids": [512, 514, 513]}))
    assert "gives the special tokens other ids" in refused()
    file.unlink()
    assert "gem_config.json is missing" in refused()
    file.write_text(json.dumps(whole))

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    lora = {name: tensor for name, tensor in tensors.items() if "lora" in name}
    save_file(lora, weights)
    assert "does not hold 3 special tokens' rows" in refused()
    weights.write_bytes(b"")
    assert "cannot be read" in refused()


def test_command_line(tiny_base, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    from gem_vllm import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gem-vllm", "adapter", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code, capsys.readouterr()

    code, output = run("extract", tiny_checkpoint(), "--out", tmp_path / "adapter")
    assert (code, output.out.strip()) == (0, str(tmp_path / "adapter"))
    arguments = ("apply", "--adapter", tmp_path / "adapter", "--out", tmp_path / "gem", "--base")
    code, output = run(*arguments, tiny_base())
    assert (code, output.out.strip()) == (0, str(tmp_path / "gem"))
    code, output = run(*arguments, tiny_base())
    assert code == 2
    assert "is not empty; replace it with --overwrite" in output.err
    code, _ = run("extract", tiny_checkpoint(), "--out", tmp_path / "gem")
    assert code == 2
    assert (tmp_path / "gem" / "model.safetensors").is_file()
    code, _ = run("extract", tiny_checkpoint(), "--overwrite", "--out", tmp_path / "adapter")
    assert code == 0

    code, output = run(*arguments, tiny_base("mistral"), "--overwrite")
    assert code == 2
    assert output.err.startswith("error: the adapter is for tiny-llama with architecture")
    assert output.err.count("\n") == 1
    code, output = run("extract", tiny_base(), "--out", tmp_path / "other")
    assert code == 2
    code, output = run("extract", tmp_path / "nowhere", "--out", tmp_path / "other")
    assert code == 2
    assert "name the folder of a GEM checkpoint" in output.err
