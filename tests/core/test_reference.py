"""The reference against the definition: the mask, the LoRA's place, pooling, decoding."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gem_vllm.checkpoint import load_checkpoint
from gem_vllm.errors import GemError
from gem_vllm.mask import gem_mask
from gem_vllm.reference import ReferenceEmbedder
from tests.tiny import FAMILIES

K = 3
SPECIAL = list(range(512, 512 + K))
TEXTS = [
    "Bread",
    "Paris is the capital of France.",
    "A library keeps books, maps and newspapers, and lends most of them to its readers for free.",
]
PROMPT = [1, 42, 339, 78, 81, 279, 81, 84, 356, 300, 17, 290, 33, 401, 77, 260, 9, 350, 11, 280]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    @cache
    def load(family="llama", **options):
        return ReferenceEmbedder(tiny_checkpoint(family, k=K, **options))

    return load


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_is_the_definition(family, reference):
    """Hidden states at the special positions of one pass, mean in float32, then L2 norm."""
    embedder = reference(family)
    embeddings = embedder.embed(TEXTS)
    assert embeddings.shape == (3, 64)
    assert embeddings.dtype == torch.float32
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        ids = embedder.tokenizer(text).input_ids
        mean = embedder.hidden_states(ids + SPECIAL)[-K:].mean(0)
        torch.testing.assert_close(embedding, mean / mean.norm())
        assert torch.equal(embedder.embed([ids])[0], embedding)
    # Texts differ, so a test that compares embeddings can tell them apart.
    assert (embeddings @ embeddings.T)[~torch.eye(3, dtype=torch.bool)].max() < 0.9


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_concat_pooling(family, reference):
    embedder = reference(family, pooling="concat")
    (embedding,) = embedder.embed([PROMPT])
    hidden = embedder.hidden_states(PROMPT + SPECIAL)[-K:].flatten()
    assert embedding.shape == (K * 64,)
    torch.testing.assert_close(embedding, hidden / hidden.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_and_padding_do_not_matter(family, side, reference):
    """A padded batch by hand, another attention implementation: the same embeddings."""
    embedder = reference(family)
    model = embedder.model
    rows = [embedder.tokenizer(text).input_ids + SPECIAL for text in TEXTS]
    longest = max(map(len, rows))
    token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    real = torch.zeros_like(token_ids)
    for i, ids in enumerate(rows):
        span = slice(longest - len(ids), None) if side == "left" else slice(len(ids))
        token_ids[i, span], real[i, span] = torch.tensor(ids), 1
    windows = {"full_attention": None, "sliding_attention": 16}
    masks = {
        kind: gem_mask(token_ids, SPECIAL, attention_mask=real, sliding_window=window)[:, None]
        for kind, window in windows.items()
    }
    masks = {kind: torch.where(mask, 0.0, torch.finfo().min) for kind, mask in masks.items()}
    embedder._at_special = torch.isin(token_ids, torch.tensor(SPECIAL)).unsqueeze(-1).float()
    with torch.inference_mode():
        hidden = model.base_model(
            token_ids,
            attention_mask=masks
            if family in ("qwen2", "qwen3", "gemma2", "gemma3")
            else masks["full_attention"],
            position_ids=(real.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
    pooled = torch.stack(
        [hidden[i][torch.isin(token_ids[i], torch.tensor(SPECIAL))].mean(0) for i in range(3)]
    )
    torch.testing.assert_close(
        torch.nn.functional.normalize(pooled), embedder.embed(TEXTS), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_tokens_are_the_bases(family, reference, tiny_base, tiny_checkpoint):
    """Adapter mode: before a run nothing differs from the base, not by a bit."""
    embedder = reference(family)
    ids = PROMPT + SPECIAL
    hidden = embedder.hidden_states(ids)
    without_lora = plain_model(tiny_checkpoint(family, k=K))
    inputs = embedder._inputs(ids)
    base = plain_model(tiny_base(family))
    with torch.inference_mode():
        same_pass = without_lora.base_model(**inputs, use_cache=False).last_hidden_state[0]
        alone = base.base_model(torch.tensor([PROMPT])).last_hidden_state[0]
    assert torch.equal(hidden[:-K], same_pass[:-K])
    assert (hidden[-K:] != same_pass[-K:]).any(1).all()
    # Another length of the matrices is another order of additions, hence no bit equality here.
    torch.testing.assert_close(hidden[:-K], alone, atol=1e-4, rtol=1e-4)
    new = embedder.generate(PROMPT, 8)
    expected = base.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    assert PROMPT + new == expected[0].tolist()


def test_lora_is_pefts_at_special_positions(reference, tiny_checkpoint):
    """The first layer's queries: W x + (alpha / r) B A x in the run, W x elsewhere."""
    embedder = reference()
    model, _, _ = load_checkpoint(tiny_checkpoint(k=K), dtype=torch.float32)
    assert isinstance(model, PeftModel)
    weights = dict(model.named_parameters())
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b, w = (
        weights[f"{stem}.{name}.weight"]
        for name in ("lora_A.default", "lora_B.default", "base_layer")
    )
    seen = {}
    projection = embedder.model.model.layers[0].self_attn.q_proj
    hook = projection.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    embedder.hidden_states([*PROMPT[:5], *SPECIAL, 7, SPECIAL[1], 8])
    hook.remove()
    special = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0])[:, None]
    expected = seen["x"] @ w.T + special * (8 / 4) * seen["x"] @ a.T @ b.T
    torch.testing.assert_close(seen["y"], expected)


def changed_rows(embedder, ids, position, token):
    before = embedder.hidden_states(ids)
    after = embedder.hidden_states([*ids[:position], token, *ids[position + 1 :]])
    return [i for i in range(len(ids)) if not torch.equal(before[i], after[i])]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_do_not_see_each_other(family, reference):
    """Another embedding for one special token changes its own row and what comes behind the run."""
    embedder = reference(family)
    ids = PROMPT[:6] + SPECIAL + PROMPT[6:9]
    weight = embedder.model.get_input_embeddings().weight
    before = embedder.hidden_states(ids)
    for i, special in enumerate(SPECIAL):
        row = weight[special].clone()
        weight[special] += 0.3 * torch.randn(64)
        after = embedder.hidden_states(ids)
        weight[special] = row
        changed = [j for j in range(len(ids)) if not torch.equal(before[j], after[j])]
        assert changed == [6 + i, 9, 10, 11]
    assert torch.equal(embedder.hidden_states(ids), before)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bottleneck(family, reference):
    """Two runs: from one run to what follows it takes a layer, and there is no other way."""
    embedder = reference(family)
    ids = [5, 6, 7, *SPECIAL, 8, 9, *SPECIAL, 10]
    assert changed_rows(embedder, ids, 0, 99) == list(range(11))
    layers = embedder.model.base_model.layers
    embedder.model.base_model.layers = layers[:1]
    embedder.model.config.num_hidden_layers = 1
    try:
        assert changed_rows(embedder, ids, 0, 99) == [0, 1, 2, 3, 4, 5]
        assert changed_rows(embedder, ids, 6, 99) == [6, 7, 8, 9, 10]
        assert changed_rows(embedder, ids, 4, SPECIAL[0]) == [4, 6, 7, 8, 9, 10]
    finally:
        embedder.model.base_model.layers = layers
        embedder.model.config.num_hidden_layers = 2


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_decoding_from_special_tokens_is_the_full_mask(family, options, reference):
    """Dropping the prefix's keys and values is what the mask says."""
    embedder = reference(family, **options)
    new = embedder.decode_from_special_tokens(PROMPT, 12)
    assert new == embedder.generate(PROMPT + SPECIAL, 12)
    assert len(new) == 12 or new[-1] == embedder.tokenizer.eos_token_id
    assert not set(new) & set(SPECIAL)
    assert new != embedder.decode_from_special_tokens(PROMPT[::-1], 12)
    assert embedder.decode_from_special_tokens(PROMPT, 0) == []


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("gemma2", {}),
        ("gemma3", {}),
    ],
)
def test_sliding_layers_are_the_bases(family, options, reference, tiny_base):
    """Prompts beyond the window: generation is the base's own, with its own masks."""
    embedder, base = reference(family, **options), plain_model(tiny_base(family, **options))
    prompt = (PROMPT * 3)[:50]
    with torch.inference_mode():
        alone = base.base_model(torch.tensor([prompt])).last_hidden_state[0]
    hidden = embedder.hidden_states(prompt + SPECIAL)[:50]
    torch.testing.assert_close(hidden, alone, atol=1e-4, rtol=1e-4)
    wide = reference(family, **{**options, "sliding_window": 512})
    assert not torch.allclose(hidden, wide.hidden_states(prompt + SPECIAL)[:50], atol=1e-2)


def test_special_tokens_are_never_generated(reference):
    embedder = reference("qwen3")
    head = embedder.model.lm_head.weight
    rows = head[512:].clone()
    try:
        for sign in (1, -1):
            head[512:] = sign * 100
            assert max(embedder.generate(PROMPT, 4)) < 512
            assert max(embedder.decode_from_special_tokens(PROMPT, 4)) < 512
    finally:
        head[512:] = rows


def test_generation_ends(reference, monkeypatch):
    embedder = reference("qwen3")
    new = embedder.generate(PROMPT, 8)
    assert len(new) == 8
    monkeypatch.setattr(embedder.model.generation_config, "eos_token_id", [600, new[2]])
    assert embedder.generate(PROMPT, 8) == new[:3]
    monkeypatch.setattr(embedder, "max_length", len(PROMPT) + 2)
    assert embedder.generate(PROMPT, 8) == new[:2]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16(family, reference, tiny_checkpoint):
    embedder = ReferenceEmbedder(tiny_checkpoint(family, k=K), dtype=torch.bfloat16)
    assert embedder.hidden_states(PROMPT + SPECIAL).dtype == torch.bfloat16
    embeddings = embedder.embed(TEXTS)
    assert embeddings.dtype == torch.float32
    similarity = (embeddings * reference(family).embed(TEXTS)).sum(1)
    assert similarity.min() > 0.999


def test_full_mode(reference, tiny_checkpoint):
    """No LoRA and no engine of ours: plain transformers under the mask."""
    model = plain_model(tiny_checkpoint(k=K, train_mode="full"))
    ids = torch.tensor([PROMPT + SPECIAL])
    mask = torch.where(gem_mask(ids, SPECIAL)[:, None], 0.0, torch.finfo().min)
    with torch.inference_mode():
        hidden = model.base_model(ids, attention_mask=mask).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden[-K:].mean(0), dim=0)
    (embedding,) = reference("llama", train_mode="full").embed([PROMPT])
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-4)
    (with_lora,) = reference("llama").embed([PROMPT])
    assert not torch.allclose(with_lora, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([[]], "is empty"),
        ([""], "is empty"),  # but for the BOS that the tokenizer adds
        (["x <|gem_1|> y"], "has a special token"),
        ([[5, 512]], "has a special token"),
        ([[5, 515]], "from 0 to 514"),
        ([[-1]], "from 0 to 514"),
        ([[5] * 509], "has 509 tokens, and 508 fit the context beside 3 special tokens"),
        ("Bread", "takes a list of texts"),
    ],
)
def test_bad_input(texts, says, reference):
    with pytest.raises(GemError, match=says):
        reference().embed(texts)


def test_longest_and_no_text(reference):
    assert reference().embed([[5] * 508]).shape == (1, 64)
    assert reference().embed([]).shape == (0, 64)
    for call in (reference().generate, reference().decode_from_special_tokens):
        with pytest.raises(GemError, match="is empty"):
            call([], 4)
