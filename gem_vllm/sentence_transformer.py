"""A GEM checkpoint as a model of sentence-transformers.

`export` writes a folder that ``SentenceTransformer(FOLDER, trust_remote_code=True)`` loads wherever
gem-vllm is installed, with the engine's vectors. (sentence-transformers asks for
``trust_remote_code`` for every class that is not its own; no code is downloaded.)
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule

from gem_vllm.checkpoint import load_checkpoint
from gem_vllm.config import GemConfig, special_token
from gem_vllm.errors import GemError
from gem_vllm.folders import CHECKPOINT_FOLDERS, write_json, written_whole
from gem_vllm.training.losses import pool
from gem_vllm.training.modes import embedding_model
from gem_vllm.training.sequences import pad
from gem_vllm.weights import weights_size

MODULES_FILE = "modules.json"
CONFIG_FILE = "config_sentence_transformers.json"

# A pass switches a model's adapter and its kind of attention on and off: threads take turns. Of the
# module, not of a model: `encode_multi_process` pickles models.
_COMPUTING = threading.Lock()


class GemModule(InputModule):
    """The one module of such a model: texts in, pooled and normalised special tokens out.

    Args:
        folder: of the GEM checkpoint.
        dtype: of weights and computation.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.folder = folder
        model, self.tokenizer, self.gem_config = load_checkpoint(folder, dtype=dtype)
        self.tokenizer.truncation_side = "right"  # as the engine's texts are cut
        self.model = embedding_model(model, self.gem_config)
        # Not the module as a whole: frequencies of positions are in float32 in every dtype.
        self.model.log_temperature.data = self.model.log_temperature.data.to(dtype)
        self.max_seq_length = self.gem_config.max_text_tokens(
            self.model.config.max_position_embeddings
        )

    def preprocess(
        self, inputs: Any, prompt: str | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Token ids [n, T], right-padded, with their ``attention_mask``; long texts are cut.

        Raises GemError for a text that is empty or spells a special token.
        """
        texts = [(prompt or "") + text for text in inputs]
        if not all(texts):  # with a tokenizer that adds BOS, that of an empty text is not
            raise GemError("a text is empty; give at least one character")
        rows = self.tokenizer(texts, truncation=True, max_length=self.max_seq_length)["input_ids"]
        if not all(rows):
            raise GemError("a text is empty; give at least one token")
        if any(not set(self.gem_config.special_token_ids).isdisjoint(row) for row in rows):
            raise GemError(f"a text has a special token ({special_token(0)} ...); take it out")
        token_ids, lengths = pad([[*row, *self.gem_config.instruction_ids] for row in rows])
        mask = torch.arange(token_ids.shape[1]) < lengths[:, None]
        return {"input_ids": token_ids, "attention_mask": mask.long()}

    def forward(self, features: dict[str, torch.Tensor], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Adds ``sentence_embedding``: float32 [n, d], of norm 1."""
        lengths = features["attention_mask"].sum(dim=1)
        with _COMPUTING:
            hidden = self.model.special_states(features["input_ids"], lengths)
        return {**features, "sentence_embedding": pool(hidden, self.gem_config.pooling)}

    def get_embedding_dimension(self) -> int:
        """Size d of an embedding."""
        return self.gem_config.embedding_size(self.model.config.hidden_size)

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Copy the checkpoint's files, unless they are there."""
        if Path(output_path).resolve() != self.folder.resolve():
            shutil.copytree(self.folder, output_path, dirs_exist_ok=True, ignore=_no_part)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> GemModule:
        """As sentence-transformers calls it: from a folder, or a repository of the hub."""
        folder = Path(model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            downloaded = snapshot_download(
                model_name_or_path,
                revision=kwargs.get("revision"),
                token=kwargs.get("token"),
                cache_dir=kwargs.get("cache_folder"),
                local_files_only=bool(kwargs.get("local_files_only")),
            )
            folder = Path(downloaded)
        wanted = kwargs.get("model_kwargs") or {}
        dtype = wanted.get("dtype", wanted.get("torch_dtype", torch.float32))
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise GemError("model_kwargs: dtype must be a torch dtype such as float32 or bfloat16")
        return cls(folder / subfolder, dtype=dtype)


def _no_part(folder: str, names: list[str]) -> list[str]:
    """What is no part of a checkpoint: what sentence-transformers writes itself, and folders."""
    return [
        name
        for name in names
        if name in (MODULES_FILE, CONFIG_FILE)
        or (name not in CHECKPOINT_FOLDERS and (Path(folder) / name).is_dir())
    ]


def export(checkpoint: Path, out: Path) -> None:
    """Write a GEM checkpoint as a model of sentence-transformers.

    Args:
        checkpoint: folder of it, of any train mode.
        out: folder to write; see `gem_vllm.folders.written_whole`.

    Raises:
        GemConfigError: not a GEM checkpoint.
        GemError: ``out`` holds something else.
    """
    GemConfig.from_pretrained(checkpoint)
    kind = GemModule
    module = {"idx": 0, "name": "0", "path": "", "type": f"{kind.__module__}.{kind.__name__}"}
    with written_whole(out, weight_bytes=weights_size(checkpoint)) as folder:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=_no_part)
        modules = json.dumps([module], indent=2)
        (folder / MODULES_FILE).write_text(modules + "\n", encoding="utf-8")
        write_json(
            folder / CONFIG_FILE,
            {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}},
        )
