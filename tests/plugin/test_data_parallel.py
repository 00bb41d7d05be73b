"""`vllm serve --data-parallel-size 2`: two engines behind one endpoint, both with both tasks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.plugin.conftest import cosines, random_prompts
from tests.plugin.server import running_server


def test_two_engines(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, log = tiny_checkpoint("llama", k=4), tmp_path / "server.log"
    texts, questions = random_prompts(range(1, 200, 8)), random_prompts(range(5, 100, 8), seed=1)
    with (
        running_server(folder, log, "--data-parallel-size", "2") as server,
        ThreadPoolExecutor(len(texts) + len(questions)) as pool,
    ):

        def answer(prompt: list[int]) -> list[int]:
            asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            return server.post("/v1/completions", **asked).json()["choices"][0]["token_ids"]

        embedded = pool.map(lambda prompt: server.embed([prompt])[0], texts)
        answers = list(pool.map(answer, questions))
        found = torch.tensor(list(embedded))
        tokens = {
            task: server.metric("gem_prompt_tokens_total", f'task="{task}"')
            for task in ("embed", "generate")
        }
    for of_engines in tokens.values():
        assert len(of_engines) == 2
        assert all(of_engines.values()), "each engine has had both tasks"
    expected = server.reference.embed(texts)
    assert cosines(found, expected).min() >= 0.9999
    for question, said in zip(questions, answers, strict=True):
        assert said == server.reference.generate(question, 8)
