"""``gem_config``: what is read, what is written, what is refused and how."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from gem_vllm.config import (
    MAX_SPECIAL_TOKENS,
    SUPPORTED_ARCHITECTURES,
    GemConfig,
    base_architecture,
    gem_architecture,
    special_token,
)
from gem_vllm.errors import GemConfigError, GemError

GOOD = {
    "version": 1,
    "special_token_ids": [49152, 49153],
    "pooling": "concat",
    "train_mode": "full",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def test_round_trip_keeps_unknown_keys():
    written = {**GOOD, "base_sha256": "ab", "notes": {"by": ["us"]}}
    config = GemConfig.from_dict(written)
    assert config.extra == {"base_sha256": "ab", "notes": {"by": ["us"]}}
    assert config.to_dict() == written
    assert list(config.to_dict()) == list(written)
    assert GemConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(GemConfig.from_dict(written))


def test_an_instruction_needs_a_reader_of_version_2():
    config = GemConfig.from_dict({**GOOD, "instruction_ids": [7, 8]})
    assert config.appended_ids == (7, 8, 49152, 49153)
    assert config.to_dict() == {**GOOD, "version": 2, "instruction_ids": [7, 8]}
    assert GemConfig.from_dict(config.to_dict()) == config
    assert config.k == 2
    with pytest.raises(GemConfigError, match="names a token id 49153"):
        GemConfig.from_hf_config({"vocab_size": 49153, "gem_config": config.to_dict()})


def test_sizes():
    config = GemConfig.from_dict(GOOD)
    assert config.k == 2
    assert config.embedding_size(576) == 1152
    assert GemConfig((5, 6, 7), pooling="mean").embedding_size(576) == 576
    assert special_token(3) == "<|gem_3|>"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, "version 3 is unknown, this gem-vllm reads version 1, 2"),
        ({"instruction_ids": "7"}, "instruction_ids is '7'; it must be a list of token ids"),
        ({"instruction_ids": [7, 49153]}, "instruction_ids names a special token"),
        ({"version": "1"}, "version '1' is unknown"),
        ({"version": True}, "version True is unknown"),
        ({"special_token_ids": []}, "has 0 ids; give 1 to 64"),
        ({"special_token_ids": list(range(MAX_SPECIAL_TOKENS + 1))}, "has 65 ids; give 1 to 64"),
        ({"special_token_ids": [7, 8, 7]}, "repeats an id: [7, 8, 7]"),
        ({"special_token_ids": [7, -1]}, "must be a list of token ids"),
        ({"special_token_ids": [7, True]}, "must be a list of token ids"),
        ({"special_token_ids": ["7"]}, "must be a list of token ids"),
        ({"special_token_ids": 7}, "must be a list of token ids"),
        ({"special_token_ids": "78"}, "must be a list of token ids"),
        ({"pooling": "max"}, "pooling is 'max'; it must be one of: mean, concat"),
        ({"pooling": ["mean"]}, "pooling is ['mean']"),
        ({"train_mode": "qlora"}, "it must be one of: full, lora, adapter"),
        ({"base_model": None}, "give the base's name as a string"),
    ],
)
def test_bad_values_are_refused(change, says):
    with pytest.raises(GemConfigError) as caught:
        GemConfig.from_dict({**GOOD, **change})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", GOOD)
def test_missing_key_is_named(key):
    with pytest.raises(GemConfigError, match=f"lacks {key}"):
        GemConfig.from_dict({name: GOOD[name] for name in GOOD if name != key})


def test_not_an_object():
    with pytest.raises(GemConfigError, match="must be an object"):
        GemConfig.from_dict([1, 2])


def test_extra_does_not_shadow_a_field():
    with pytest.raises(GemConfigError, match="repeats \\['pooling'\\]"):
        GemConfig((7,), extra={"pooling": "mean"})


def test_error_is_a_gem_error_and_a_value_error():
    assert issubclass(GemConfigError, GemError)
    assert issubclass(GemConfigError, ValueError)


def test_from_hf_config():
    as_dict = {"vocab_size": 49154, "gem_config": GOOD}
    assert GemConfig.from_hf_config(as_dict).to_dict() == GOOD
    assert GemConfig.from_hf_config(LlamaConfig(**as_dict)).to_dict() == GOOD
    with pytest.raises(GemConfigError, match="the vocabulary ends at 49152"):
        GemConfig.from_hf_config({**as_dict, "vocab_size": 49153})
    with pytest.raises(GemConfigError, match="has no gem_config"):
        GemConfig.from_hf_config(LlamaConfig())


def test_from_pretrained(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(GemConfigError, match=r"config\.json is missing"):
        GemConfig.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(GemConfigError, match="is not JSON"):
        GemConfig.from_pretrained(tmp_path)
    file.write_text(json.dumps({"gem_config": {**GOOD, "version": 9}}))
    with pytest.raises(GemConfigError, match=f"{tmp_path}: gem_config version 9"):
        GemConfig.from_pretrained(tmp_path)
    file.write_text(json.dumps({"gem_config": GOOD}))
    assert GemConfig.from_pretrained(str(tmp_path)).to_dict() == GOOD


def test_architectures():
    assert gem_architecture("GemmaForCausalLM") == "GemGemmaForCausalLM"
    for base, gem in SUPPORTED_ARCHITECTURES.items():
        assert gem_architecture(base) == gem
        assert base_architecture(gem) == base
    for convert in (gem_architecture, base_architecture):
        with pytest.raises(GemConfigError) as caught:
            convert("MambaForCausalLM")
        message = str(caught.value)
        assert message.startswith("architecture MambaForCausalLM is not supported")
        assert all(base in message for base in SUPPORTED_ARCHITECTURES)
