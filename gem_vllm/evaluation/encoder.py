"""mteb's encoder protocol over whatever embeds: an engine, a server, or `mean_pooling`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import httpx
import numpy as np
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from tqdm import tqdm

from gem_vllm.errors import GemError

# As much as an engine is given at once, between two moves of the progress bar.
TEXTS_AT_ONCE = 1024
REQUEST_TEXTS, REQUEST_SECONDS = 64, 600.0


class Embedder(Protocol):
    """What turns texts into vectors; a text that is too long is cut at its end."""

    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 [n, d] for n texts."""
        ...


class EngineEmbedder:
    """A GEM checkpoint's engine in this process.

    Args:
        llm: `vllm.LLM` of the checkpoint.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def embed(self, texts: list[str]) -> np.ndarray:
        # The side is said: vLLM's own is the left for a model that can generate.
        truncation = {"truncate_prompt_tokens": -1, "truncation_side": "right"}
        outputs = self._llm.embed(texts, tokenization_kwargs=truncation, use_tqdm=False)
        return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)


class ServerEmbedder:
    """A server with `/v1/embeddings`.

    Args:
        url: of the server, without `/v1`.
        model: its name there.
        api_key: sent as a bearer token.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.Client(base_url=url, timeout=REQUEST_SECONDS, headers=headers)
        except httpx.InvalidURL as error:
            raise GemError(f"--url {url} is no address: {error}") from error
        self._url, self._model = url, model

    def embed(self, texts: list[str]) -> np.ndarray:
        parts = [
            self._post(texts[start : start + REQUEST_TEXTS])
            for start in range(0, len(texts), REQUEST_TEXTS)
        ]
        return np.array([vector for part in parts for vector in part], dtype=np.float32)

    def _post(self, texts: list[str]) -> np.ndarray:
        request = {
            "model": self._model,
            "input": texts,
            "truncate_prompt_tokens": -1,
            "truncation_side": "right",
        }
        try:
            answer = self._client.post("/v1/embeddings", json=request)
        except httpx.HTTPError as error:
            raise GemError(f"--url {self._url} does not answer: {error}") from error
        if answer.is_error:
            raise GemError(f"--url {self._url} answered {answer.status_code}: {_start(answer)}")
        try:
            return _vectors(answer.json(), len(texts))
        except (KeyError, TypeError, ValueError) as error:
            raise GemError(
                f"--url {self._url} answered {answer.status_code} without embeddings: "
                f"{_start(answer)}; give the address of a server with /v1/embeddings"
            ) from error


def _vectors(answer: Any, count: int) -> np.ndarray:
    """float32 [count, d] of a server's answer; KeyError, TypeError or ValueError for another."""
    data = sorted(answer["data"], key=lambda item: item["index"])
    vectors = np.array([item["embedding"] for item in data], dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != count:
        raise ValueError(f"{vectors.shape} numbers for {count} texts")
    return vectors


def _start(answer: httpx.Response) -> str:
    """What an answer begins with, in one line."""
    return " ".join(answer.text.split())[:300]


def model_meta(name: str, revision: str, prompts: Mapping[str, str] | None) -> ModelMeta:
    """What mteb keeps results by."""
    return ModelMeta.create_empty(
        {
            "name": f"gem-vllm/{name}",
            "revision": revision,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": bool(prompts),
            "modalities": ["text"],
        }
    )


class GemEncoder(AbsEncoder):
    """An `Embedder` as mteb wants one; the same text gets the same vector within a task.

    Args:
        embedder: computes each text once, until `forget`.
        name, revision: of the model, for the results.
        prompts: put before a text, by mteb's names for prompts: a task's name or type, `query` or
            `document`, or both joined with `-`.
    """

    def __init__(
        self, embedder: Embedder, name: str, revision: str, prompts: Mapping[str, str] | None = None
    ) -> None:
        self.model = embedder
        self.model_prompts = dict(prompts or {})
        self.mteb_model_meta = model_meta(name, revision, prompts)
        self._vectors: dict[str, np.ndarray] = {}

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """float32 [n, d] of all texts of a data loader, in order."""
        key = get_prompt_name(self.model_prompts, task_metadata, prompt_type)
        prompt = self.model_prompts[key] if key else ""
        # An engine refuses an empty text; a benchmark may hold one.
        texts = [prompt + (text or " ") for batch in inputs for text in batch["text"]]
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        with tqdm(total=len(new), desc=task_metadata.name, unit=" texts", disable=not new) as bar:
            for start in range(0, len(new), TEXTS_AT_ONCE):
                part = new[start : start + TEXTS_AT_ONCE]
                self._vectors.update(zip(part, self.model.embed(part), strict=True))
                bar.update(len(part))
        return np.stack([self._vectors[text] for text in texts])

    def forget(self) -> None:
        """Let go of the vectors: of the next task nearly all texts are others."""
        self._vectors.clear()
