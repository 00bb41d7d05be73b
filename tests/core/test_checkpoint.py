"""Checkpoints: what `load_base` takes, what is saved, that it comes back."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_vllm.checkpoint import add_special_tokens, load_base, load_checkpoint, save_checkpoint
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemConfigError
from tests.tiny import FAMILIES, make_tiny_base, make_tiny_checkpoint

K = 3
EMBEDDING = "model.embed_tokens.weight"


def edit_json(file, **changes):
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps({key: value[key] for key in value if value[key] is not ...}))


@pytest.fixture
def base_copy(tiny_base, tmp_path):
    return shutil.copytree(tiny_base(), tmp_path / "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tiny_checkpoint, tmp_path):
    """Load, save, load: the same files, and the base's tensors are those of the base."""
    folder = tiny_checkpoint(family)
    model, tokenizer, config = load_checkpoint(folder, dtype=torch.float32)
    assert isinstance(model, PeftModel)
    assert config.special_token_ids == tuple(range(512, 512 + K))
    assert tokenizer.convert_tokens_to_ids("<|gem_2|>") == config.special_token_ids[2]
    assert tokenizer.chat_template

    again = tmp_path / "again"
    save_checkpoint(again, model, tokenizer, config)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (again / file).read_bytes() == (folder / file).read_bytes(), file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_kept_bit_for_bit(family, dtype, tiny_base, tmp_path):
    """Whatever dtype the base has, and whatever dtype it was loaded in."""
    base = tiny_base(family)
    if dtype == torch.bfloat16:
        base = tmp_path / "base"
        make_tiny_base(family, base)
        tensors = load_file(base / "model.safetensors")
        halves = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
        edit_json(base / "config.json", dtype="bfloat16")
    in_memory = torch.bfloat16 if dtype == torch.float32 else torch.float32
    model, tokenizer = load_base(base, dtype=in_memory)
    ids = add_special_tokens(model, tokenizer, K)
    lora = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=list(ids))
    peft_model = get_peft_model(model, lora)
    delta = peft_model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    delta.data.normal_()
    folder = tmp_path / "gem"
    save_checkpoint(folder, peft_model, tokenizer, GemConfig(ids))

    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name][: len(tensor)].view(torch.uint8), tensor.view(torch.uint8))
        assert name in (EMBEDDING, "lm_head.weight") or len(after[name]) == len(tensor)
    assert torch.equal(after[EMBEDDING][list(ids)], delta.data.to(dtype))


def test_checkpoint_folder(tiny_checkpoint):
    folder = tiny_checkpoint()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GemLlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["vocab_size"] == 515
    assert config["gem_config"]["train_mode"] == "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "gem_adapter",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for file in (path for path in folder.rglob("*") if path.is_file()):
        assert str(folder.parent).encode() not in file.read_bytes(), file
        assert file.stat().st_mode & 0o444 == (folder / "config.json").stat().st_mode & 0o444


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("train_mode", ["full", "adapter"])
def test_plain_transformers_loads_it(family, train_mode, tiny_checkpoint):
    """As the base class, and its `generate` never emits a special token."""
    folder = tiny_checkpoint(family, train_mode=train_mode)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not type(model).__name__.startswith("Gem")
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[512:] = 100 * head[:512].abs().max()
    inputs = tokenizer(
        "What is the capital of France?", return_tensors="pt", add_special_tokens=False
    )
    for sign in (1, -1):  # one of the two makes the special tokens' logits the highest
        head.data[512:] *= sign
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert output.max() < 512
    decoded = tokenizer.decode([*inputs.input_ids[0], 512, 514], skip_special_tokens=True)
    assert decoded == "What is the capital of France?"


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_full_mode_round_trip(family, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(family, train_mode="full", pooling="concat")
    model, tokenizer, config = load_checkpoint(folder, dtype=torch.float32)
    assert not isinstance(model, PeftModel)
    assert (config.train_mode, config.pooling, config.extra) == ("full", "concat", {})
    save_checkpoint(tmp_path / "again", model, tokenizer, config)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (folder / "gem_adapter").exists()


def test_mistrals_own_tokenizer_beside_the_ordinary_one(tiny_base, tmp_path):
    """Where there is a tekken.json, transformers takes it by itself; it takes no new tokens."""
    base = shutil.copytree(tiny_base("mistral"), tmp_path / "base")
    (base / "tekken.json").write_text("{}")
    make_tiny_checkpoint("mistral", tmp_path / "gem", k=K, base=base)
    _, tokenizer, config = load_checkpoint(tmp_path / "gem", dtype=torch.float32)
    assert config.special_token_ids == tuple(range(512, 512 + K))
    assert tokenizer("<|gem_1|>", add_special_tokens=False).input_ids == [513]
    assert "mistral" not in (tmp_path / "gem" / "tokenizer_config.json").read_text()


def test_several_chat_templates_are_kept(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base(), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "tools"}
    tokenizer.save_pretrained(base)
    for _ in range(2):  # and may be replaced
        make_tiny_checkpoint("llama", tmp_path / "gem", k=K, base=base)
    _, tokenizer, _ = load_checkpoint(tmp_path / "gem", dtype=torch.float32)
    assert tokenizer.chat_template.keys() == {"default", "tool_use"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [0, 2, 8])
def test_embedding_grows_only_if_needed(tied, spare_rows, tmp_path):
    """A base with rows to spare, as Qwen has, keeps its size; ids follow the tokenizer."""
    options = {"vocab_size": 512 + spare_rows, "tie_word_embeddings": tied}
    base = make_tiny_base("llama", tmp_path / "base", **options)
    model, tokenizer = load_base(base, dtype=torch.float32)
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_special_tokens(model, tokenizer, K) == (512, 513, 514)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert len(embedding) == len(head) == model.config.vocab_size == max(515, 512 + spare_rows)
    assert torch.equal(embedding[:512], before[:512])
    assert (head is embedding) == tied
    assert embedding[512:515].unique(dim=0).shape[0] == K
    if not tied:
        assert not head[512:515].any()
    folder = make_tiny_checkpoint("llama", tmp_path / "gem", k=K, base=base)
    saved = load_checkpoint(folder, dtype=torch.float32)[0].get_input_embeddings().weight
    assert saved.shape == embedding.shape
    assert torch.equal(saved[:512], before[:512])


def test_sharded_base(tiny_base, tiny_checkpoint, tmp_path):
    """Several files stay several files, and the hash of the base is the same."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_base()).save_pretrained(base, max_shard_size="90KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    folder = make_tiny_checkpoint("llama", tmp_path / "gem", k=K, base=base)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {k: v for name in shards for k, v in load_file(folder / name).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    single = tiny_checkpoint()
    sharded_config, single_config = map(GemConfig.from_pretrained, (folder, single))
    assert sharded_config == single_config
    for name, tensor in load_file(single / "model.safetensors").items():
        assert torch.equal(tensors[name], tensor)
    load_checkpoint(folder, dtype=torch.float32)


@pytest.mark.parametrize("k", [0, -1, 65])
def test_number_of_special_tokens(k, tiny_base):
    model, tokenizer = load_base(tiny_base(), dtype=torch.float32)
    with pytest.raises(GemConfigError, match="give 1 to 64"):
        add_special_tokens(model, tokenizer, k)


def test_special_tokens_are_added_once(tiny_base):
    model, tokenizer = load_base(tiny_base(), dtype=torch.float32)
    add_special_tokens(model, tokenizer, 64)
    with pytest.raises(GemConfigError, match=r"has <\|gem_0\|> already"):
        add_special_tokens(model, tokenizer, 1)


def refused(load, folder):
    with pytest.raises(GemConfigError) as caught:
        load(folder, dtype=torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_load_base_refuses(base_copy, tiny_checkpoint):
    assert "is not a folder" in refused(load_base, base_copy / "nothing")
    assert "is a GEM checkpoint already" in refused(load_base, tiny_checkpoint())

    edit_json(base_copy / "config.json", architectures=["MambaForCausalLM"])
    message = refused(load_base, base_copy)
    assert "architecture MambaForCausalLM is not supported" in message
    assert "LlamaForCausalLM, MistralForCausalLM" in message
    edit_json(base_copy / "config.json", architectures=None)
    assert "architecture (none named) is not supported" in refused(load_base, base_copy)
    edit_json(base_copy / "config.json", architectures=["LlamaForCausalLM"])

    edit_json(base_copy / "config.json", num_hidden_layers=3)
    assert "lacks 9 tensors (model.layers.2." in refused(load_base, base_copy)
    edit_json(base_copy / "config.json", num_hidden_layers=2)
    edit_json(base_copy / "config.json", intermediate_size=97)
    assert "cannot be loaded: " in refused(load_base, base_copy)
    edit_json(base_copy / "config.json", intermediate_size="wide")
    message = refused(load_base, base_copy)
    assert "config.json cannot be used: " in message
    assert "'intermediate_size'" in message
    assert "wide" in message
    edit_json(base_copy / "config.json", intermediate_size=96)

    edit_json(base_copy / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "is quantized (bitsandbytes); name the model" in refused(load_base, base_copy)
    edit_json(base_copy / "config.json", quantization_config=...)

    weights = base_copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    assert "model.safetensors cannot be read" in refused(load_base, base_copy)
    weights.rename(base_copy / "pytorch_model.bin")
    assert "other weight formats are not read" in refused(load_base, base_copy)
    (base_copy / "pytorch_model.bin").rename(weights)
    save_file({"transformer.wte.weight": torch.zeros(2)}, weights)
    assert f"no tensor {EMBEDDING}" in refused(load_base, base_copy)
    weights.write_bytes(whole)

    tokens = (base_copy / "tokenizer.json").read_text()
    (base_copy / "tokenizer.json").write_text(tokens[: len(tokens) // 2])
    assert "has no tokenizer that can be loaded" in refused(load_base, base_copy)
    (base_copy / "tokenizer.json").unlink()
    assert "has no tokenizer that can be loaded" in refused(load_base, base_copy)
    (base_copy / "config.json").write_text("[]")
    assert "is not a JSON object" in refused(load_base, base_copy)


def test_load_checkpoint_refuses(checkpoint_copy, tiny_base):
    assert "has no gem_config" in refused(load_checkpoint, tiny_base())

    adapter = checkpoint_copy / "gem_adapter"
    for change, says in [
        ({"use_dora": True}, "use_dora = True"),
        ({"use_rslora": True}, "use_rslora = True"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2}"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ]:
        original = (adapter / "adapter_config.json").read_text()
        edit_json(adapter / "adapter_config.json", **change)
        assert says in refused(load_checkpoint, checkpoint_copy)
        (adapter / "adapter_config.json").write_text(original)

    tensors = load_file(adapter / "adapter_model.safetensors")
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    diagonal = next(iter(tensors)).replace(".lora_A.weight", ".lora_diag")
    save_file({**tensors, diagonal: torch.ones(4)}, adapter / "adapter_model.safetensors")
    assert f"has {diagonal}, which is of no plain LoRA" in refused(load_checkpoint, checkpoint_copy)
    (adapter / "adapter_model.safetensors").write_bytes(whole)

    (adapter / "adapter_model.safetensors").rename(adapter / "elsewhere")
    message = refused(load_checkpoint, checkpoint_copy)
    assert "gem_adapter/adapter_model.safetensors is missing" in message
    (adapter / "elsewhere").rename(adapter / "adapter_model.safetensors")

    shutil.copyfile(tiny_base() / "tokenizer.json", checkpoint_copy / "tokenizer.json")
    edit_json(checkpoint_copy / "tokenizer_config.json", extra_special_tokens=...)
    assert "does not give <|gem_0|>" in refused(load_checkpoint, checkpoint_copy)


def test_save_needs_a_plain_lora(tiny_base, tmp_path):
    model, tokenizer = load_base(tiny_base(), dtype=torch.float32)
    config = GemConfig(add_special_tokens(model, tokenizer, 1))
    with pytest.raises(TypeError, match="needs a PeftModel"):
        save_checkpoint(tmp_path / "gem", model, tokenizer, config)
    lora = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    with pytest.raises(GemConfigError, match="use_dora"):
        save_checkpoint(tmp_path / "gem", get_peft_model(model, lora), tokenizer, config)
    assert list(tmp_path.iterdir()) == []
