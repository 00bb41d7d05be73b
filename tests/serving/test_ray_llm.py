"""Ray's own batch processor on a GEM checkpoint wants a pooling engine: refused at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig


@pytest.mark.usefixtures("cluster")
def test_a_pooling_processor_fails_with_what_to_do(tiny_checkpoint: Callable[..., Path]) -> None:
    config = vLLMEngineProcessorConfig(
        model_source=str(tiny_checkpoint("llama", k=2)),
        task_type="embed",
        engine_kwargs={
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 1 << 26,
            "max_model_len": 256,
        },
        concurrency=1,
        batch_size=8,
        chat_template_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": 1}]},
        runtime_env={"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
    )
    processor = build_processor(
        config, preprocess=lambda row: {"prompt": row["text"], "pooling_params": {}}
    )
    rows = ray.data.from_items([{"text": "a river"}])
    with pytest.raises(ray.exceptions.RayError, match="Start it without --runner and --convert"):
        processor(rows).take_all()
