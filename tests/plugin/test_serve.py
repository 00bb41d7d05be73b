"""`vllm serve CHECKPOINT`, vLLM's own command: every route, both tasks at once, bad requests."""

from __future__ import annotations

import base64
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.plugin.conftest import cosines
from tests.plugin.server import LIMIT, VLLM, Server, running_server

K = 4
TEXTS = ["A library keeps books and maps.", "Bread is made from flour.", "1969"]


@pytest.fixture(scope="module")
def server(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(tiny_checkpoint("llama", k=K), log) as running:
        yield running


def steps(server: Server, kind: str) -> float:
    (count,) = server.metric("gem_steps_total", f'kind="{kind}"').values()
    return count


def test_embeddings_are_the_references(server: Server) -> None:
    expected = server.reference.embed(TEXTS)
    assert cosines(torch.tensor(server.embed(TEXTS)), expected).min() >= 0.9999

    ids = [server.reference.tokenizer(text).input_ids for text in TEXTS]
    assert cosines(torch.tensor(server.embed(ids)), expected).min() >= 0.9999
    assert cosines(torch.tensor(server.embed(ids[0])), expected[:1]).min() >= 0.9999

    (packed,) = server.embed(TEXTS[0], encoding_format="base64")
    raw = base64.b64decode(packed)
    floats = torch.tensor(struct.unpack(f"<{len(raw) // 4}f", raw))
    assert cosines(floats[None], expected[:1]).min() >= 0.9999

    (short,) = server.embed(TEXTS[0], dimensions=16)
    leading = torch.nn.functional.normalize(expected[0, :16], dim=0)
    np.testing.assert_allclose(short, leading, atol=1e-4)


def test_langchains_openai_embeddings(server: Server) -> None:
    """As README says; with the length check off, texts are sent, not OpenAI's token ids."""
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model="gem",
        base_url=f"{server.url}/v1",
        api_key="none",
        check_embedding_ctx_length=False,
    )
    expected = server.reference.embed(TEXTS)
    assert cosines(torch.tensor(embeddings.embed_documents(TEXTS)), expected).min() >= 0.9999
    query = torch.tensor(embeddings.embed_query(TEXTS[1]))
    assert cosines(query[None], expected[1:2]).min() >= 0.9999


def test_usage_counts_the_users_tokens_only(server: Server) -> None:
    ids = server.reference.tokenizer(TEXTS[0]).input_ids
    usage = server.post("/v1/embeddings", input=TEXTS[0]).json()["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("route", "body", "read"),
    [
        ("/v1/completions", {"prompt": TEXTS[0], "max_tokens": 4}, "choices"),
        ("/v1/responses", {"input": TEXTS[0], "max_output_tokens": 4}, "output"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 4},
            "choices",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("/") else "",
)
def test_every_generating_route_answers(
    server: Server, route: str, body: dict[str, Any], read: str
) -> None:
    answer = server.post(route, **body)
    assert answer.status_code == 200, answer.text
    assert answer.json()[read]


def test_vectors_and_scores_of_the_other_routes(server: Server) -> None:
    expected = server.reference.embed(TEXTS)

    def answer(route: str, **body: Any) -> dict[str, Any]:
        answered = server.post(route, **body)
        assert answered.status_code == 200, answered.text
        return answered.json()

    cohere = {"texts": TEXTS, "embedding_types": ["float"]}
    embedded = answer("/v2/embed", **cohere)["embeddings"]["float"]
    named = answer("/v2/embed", **cohere, input_type="search_query")["embeddings"]["float"]
    pooled = [each["data"] for each in answer("/pooling", input=TEXTS)["data"]]
    for vectors in (embedded, named, pooled):
        assert cosines(torch.tensor(vectors), expected).min() >= 0.9999
    scores = [each["score"] for each in answer("/score", text_1=TEXTS[0], text_2=TEXTS)["data"]]
    np.testing.assert_allclose(scores, expected @ expected[0], atol=1e-3)


def test_rerank_puts_the_query_itself_first(server: Server) -> None:
    results = server.post("/rerank", query=TEXTS[1], documents=TEXTS).json()["results"]
    assert results[0]["index"] == 1
    assert results[0]["relevance_score"] == pytest.approx(1.0, abs=1e-4)


ROUNDS = 5


def test_both_tasks_at_the_same_time(server: Server) -> None:
    """The official client: embeddings, chat and streamed chat in the same engine steps."""
    expected = server.reference.embed(TEXTS)
    messages: Any = [{"role": "user", "content": TEXTS[1]}]
    options: Any = {"model": "gem", "messages": messages, "max_tokens": 64, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    alone = server.client.chat.completions.create(**options).choices[0].message.content
    before = steps(server, "mixed")

    def embed(_: int) -> list[list[float]]:
        return [
            entry.embedding
            for entry in server.client.embeddings.create(model="gem", input=TEXTS).data
        ]

    def chat(_: int) -> str | None:
        return server.client.chat.completions.create(**options).choices[0].message.content

    def stream(_: int) -> str:
        chunks = server.client.chat.completions.create(stream=True, **options)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    # Until some of them have met in a step, which a slow client may miss: its chats are then
    # answered before it has sent an embedding.
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(12) as pool:
            chats = [pool.submit(job, i) for i in range(4) for job in (chat, stream)]
            embedded = [pool.submit(embed, i) for i in range(12)]
            while not all(future.done() for future in chats):
                embedded.append(pool.submit(embed, len(embedded)))
                embedded[-1].result()
            for future in embedded:
                assert cosines(torch.tensor(future.result()), expected).min() >= 0.9999
            assert {future.result() for future in chats} == {alone}
        if steps(server, "mixed") > before:
            break
    assert steps(server, "mixed") > before
    assert steps(server, "embed") > 0
    assert steps(server, "generate") > 0


SPECIAL = "special"


def test_compressed_context(server: Server) -> None:
    """A completion decodes from special tokens alone; a chat message is read through them."""
    text, tokenizer = TEXTS[0] * 6, server.reference.tokenizer
    options: dict[str, Any] = {
        "temperature": 0,
        "max_tokens": 8,
        "extra_body": {"ignore_eos": True},
    }
    expected = server.reference.decode_from_special_tokens(tokenizer(text).input_ids, 8)
    compress = {"gem": {"compress": True}}
    answer = server.client.completions.create(
        model="gem", prompt=text, **{**options, "extra_body": {"ignore_eos": True, **compress}}
    )
    assert answer.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer(text).input_ids) + K

    run = "".join(f"<|gem_{i}|>" for i in range(K))
    question = {"role": "user", "content": "What is lent?"}
    messages: list[Any] = [{"role": "user", "content": text, **compress}, question]
    spelled = tokenizer.apply_chat_template(
        [{"role": "user", "content": text + run}, question],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(spelled, add_special_tokens=False).input_ids
    chat = server.client.chat.completions.create(model="gem", messages=messages, **options)
    assert chat.choices[0].message.content == tokenizer.decode(
        server.reference.generate(ids, 8), skip_special_tokens=True
    )
    whole = server.client.chat.completions.create(
        model="gem", messages=[{"role": "user", "content": text}, question], **options
    )
    assert whole.choices[0].message.content != chat.choices[0].message.content


def cached_tokens(server: Server) -> float:
    """Prompt tokens that came from the prefix cache, by vLLM's own counter."""
    (count,) = server.metric("vllm:prefix_cache_hits_total").values()
    return count


def test_one_prefix_cache_for_both_tasks(server: Server) -> None:
    """Embed and then ask, ask and then embed, embed under a shared instruction: hits, and exact."""
    tokenizer, reference = server.reference.tokenizer, server.reference
    question, block = " What is lent to whom?", 32

    def complete(prompt: str) -> str:
        answer = server.post(
            "/v1/completions", prompt=prompt, max_tokens=8, temperature=0, ignore_eos=True
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def embed(text: str) -> str:
        expected = reference.embed([text])
        assert cosines(torch.tensor(server.embed([text])), expected) >= 0.9999
        return ""

    for document, first, second, more in (
        ("Maps of the north. " * 9, embed, complete, question),
        ("Maps of the south. " * 9, complete, embed, ""),
        ("Instruct: find maps of the same region. " * 4, embed, embed, "Maps of the west."),
    ):
        shared = len(tokenizer(document).input_ids) // block * block
        assert shared >= block
        first(document)
        before = cached_tokens(server)
        answer = second(document + more)
        # The last token of a text may differ from that of the text with more behind it.
        assert cached_tokens(server) - before >= shared - block
        if answer:
            ids = tokenizer(document + more).input_ids
            assert answer == tokenizer.decode(reference.generate(ids, 8), skip_special_tokens=True)


def test_an_answer_with_its_prompts_embedding(server: Server) -> None:
    """Whole and streamed, of chats and completions; the prompt is computed once for both."""
    tokenizer, reference = server.reference.tokenizer, server.reference
    embed = {"gem": {"embed": True}, "ignore_eos": True}
    messages: list[Any] = [{"role": "user", "content": f"{text} Why? "} for text in TEXTS * 4]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    expected = reference.embed([ids])
    before = cached_tokens(server)
    options: dict[str, Any] = {"model": "gem", "temperature": 0, "max_tokens": 8}
    chats = server.client.chat.completions
    chat = chats.create(messages=messages, **options, extra_body=embed)
    assert cached_tokens(server) - before >= len(ids) // 32 * 32
    plain = chats.create(messages=messages, **options, extra_body={"ignore_eos": True})
    assert chat.choices[0].message.content == plain.choices[0].message.content
    assert chat.usage == plain.usage
    assert chat.model_extra is not None
    assert cosines(torch.tensor(chat.model_extra["gem"]["embeddings"]), expected) >= 0.9999
    assert "gem" not in (plain.model_extra or {})

    chunks = [*chats.create(messages=messages, **options, extra_body=embed, stream=True)]
    *answer, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in answer) == (
        plain.choices[0].message.content
    )
    assert last.id == answer[0].id
    assert last.model_extra is not None
    assert cosines(torch.tensor(last.model_extra["gem"]["embeddings"]), expected) >= 0.9999

    several = server.client.completions.create(prompt=TEXTS, **options, extra_body=embed)
    assert several.model_extra is not None
    found = torch.tensor(several.model_extra["gem"]["embeddings"])
    assert cosines(found, reference.embed(TEXTS)).min() >= 0.9999


def test_what_a_text_is_as_tokens_is_told_of_any_text(server: Server) -> None:
    answer = server.post("/tokenize", prompt="<|gem_0|>", add_special_tokens=False)
    assert answer.json()["tokens"] == [server.reference.gem_config.special_token_ids[0]]


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("/v1/embeddings", {"input": ""}, 400, "empty"),
        ("/v1/embeddings", {"input": []}, 400, "at least one"),
        ("/v1/embeddings", {"input": [[]]}, 400, "empty"),
        ("/v1/embeddings", {"input": {"text": "a"}}, 400, "valid"),
        ("/v1/embeddings", {"input": 7}, 400, "valid"),
        ("/v1/embeddings", {"input": [10**6]}, 400, "vocabulary"),
        ("/v1/embeddings", {"input": [7] * 252}, 400, "251"),
        ("/v1/embeddings", {"input": "bread " * 300}, 400, "251"),
        ("/v1/embeddings", {"input": "a", "dimensions": 65}, 400, "64"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "morse"}, 400, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "padding": "max_length"}, 400, '"padding" is not for'),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "does not exist"),
        ("/v1/embeddings", {"input": "say <|gem_0|>"}, 400, "reserved GEM token"),
        ("/v1/embeddings", {"input": [5, SPECIAL, 6]}, 400, "no whole run"),
        ("/v1/completions", {"prompt": "say <|gem_1|>"}, 400, "reserved GEM token"),
        ("/v1/completions", {"prompt": [SPECIAL]}, 400, "no whole run"),
        ("/score", {"text_1": "a", "text_2": "<|gem_3|>"}, 400, "reserved GEM token"),
        ("/rerank", {"query": "<|gem_0|>", "documents": ["a"]}, 400, "reserved GEM token"),
        (
            "/generative_scoring",
            {
                "query": "is it so?",
                "items": ["yes", "<|gem_0|><|gem_1|><|gem_2|><|gem_3|> yes"],
                "label_token_ids": [5, 6],
            },
            400,
            "reserved GEM token",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a", "gem": {"compress": True}}],
                "kv_transfer_params": {"prompt_token_ids": [5, 6]},
            },
            400,
            "kv_transfer_params",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "<|gem_2|>"}]},
            400,
            "reserved GEM token",
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "<|gem_0|><|gem_1|><|gem_2|><|gem_3|>"}],
                "chat_template_kwargs": {"tokenize": True},
            },
            400,
            "reserved GEM token",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a", "gem": {"compress": "yes"}}]},
            400,
            "is true or false",
        ),
        ("/v1/completions", {"prompt": "a", "gem": {"compress": "yes"}}, 400, "is true or false"),
        ("/v1/completions", {"prompt": "a", "gem": {"embeds": True}}, 400, "takes compress, embed"),
        ("/v1/completions", {"prompt": ["a", ""], "gem": {"embed": True}}, 400, "empty"),
        (
            "/v1/completions",
            {"prompt": "a", "gem": {"compress": True}, "echo": True},
            400,
            '"echo" is not for',
        ),
        (
            "/v1/completions",
            {"prompt": [7] * 254, "max_tokens": 1, "gem": {"embed": True}},
            400,
            "may have 1 to 251",
        ),
        (
            "/v1/completions",
            {"prompt": "a", "gem": {"embed": True, "compress": True}},
            400,
            "does not go with",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "gem": {"compress": True}},
            400,
            "takes embed",
        ),
        ("/v1/completions", {"prompt": "<|gem_0|>", "gem": {"compress": True}}, 400, "reserved"),
        ("/v1/completions", {"prompt": "<|gem_1|>", "stream": True}, 400, "reserved GEM token"),
        ("/v1/completions", {"prompt": [SPECIAL], "stream": True}, 400, "no whole run"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "<|gem_2|>"}], "stream": True},
            400,
            "reserved GEM token",
        ),
        ("/v1/responses", {"input": "<|gem_2|>", "stream": True}, 400, "reserved GEM token"),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a", "gem": {"compress": True}}],
                "echo": True,
                "stream": True,
            },
            400,
            '"echo" is not for',
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a", "gem": {"compress": True}}],
                "prompt_logprobs": 1,
            },
            400,
            "prompt_logprobs is not for",
        ),
    ],
)
def test_bad_requests(
    server: Server, route: str, body: dict[str, Any], status: int, message: str
) -> None:
    special = server.reference.gem_config.special_token_ids[0]
    body = {
        key: [special if item == SPECIAL else item for item in value]
        if isinstance(value, list)
        else value
        for key, value in body.items()
    }
    answer = server.post(route, **body)
    assert answer.status_code == status, answer.text
    assert message.lower() in answer.json()["error"]["message"].lower()


def test_neighbours_of_bad_requests_are_served(server: Server) -> None:
    expected = server.reference.embed(TEXTS[:1])
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(server.post, "/v1/embeddings", input="<|gem_0|>") for _ in range(8)]
        good = [pool.submit(server.embed, TEXTS[0]) for _ in range(8)]
        assert {future.result().status_code for future in bad} == {400}
        for future in good:
            assert cosines(torch.tensor(future.result()), expected).min() >= 0.9999


def test_truncation_keeps_the_special_tokens(server: Server) -> None:
    long = "bread " * 300
    ids = server.reference.tokenizer(long).input_ids[: LIMIT - K - 1]
    expected = server.reference.embed([ids])
    cut = server.embed(long, truncate_prompt_tokens=-1)
    assert cosines(torch.tensor(cut), expected).min() >= 0.9999


@pytest.mark.parametrize(
    ("backend", "route", "told"),
    [
        ("openai-chat", "/v1/chat/completions", "Mean TPOT"),
        ("openai-embeddings", "/v1/embeddings", "Mean E2EL"),
    ],
)
def test_vllms_own_benchmark(server: Server, backend: str, route: str, told: str) -> None:
    """`vllm bench serve`, of either task."""
    command = [VLLM, "bench", "serve", "--backend", backend, "--base-url", server.url]
    command += ["--endpoint", route, "--model", "gem"]
    command += ["--tokenizer", str(server.folder), "--dataset-name", "random"]
    command += ["--num-prompts", "12", "--random-input-len", "40", "--random-output-len", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(re.findall(r"^(\w+ requests): +(\d+)", done.stdout, flags=re.MULTILINE))
    assert counts["Successful requests"] == "12"
    assert counts["Failed requests"] == "0"
    assert told in done.stdout
