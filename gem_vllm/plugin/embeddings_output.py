"""A step's output with embeddings that are still on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from gem_vllm.plugin.batch import Embeddings


class EmbeddingsOutput(AsyncModelRunnerOutput):
    """A step's output with embeddings, which are copied to the CPU while other steps run.

    Args:
        output: vLLM's, of the same step.
        embeddings: on the device.
        main_stream: where they are computed.
        copy_stream: where they are copied.
    """

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        embeddings: Sequence[Embeddings],
        main_stream: torch.cuda.Stream,
        copy_stream: torch.cuda.Stream,
    ) -> None:
        self.output = output
        # Kept until they are copied: their memory is the main stream's.
        self.embeddings = embeddings
        # Sleeps while it waits, as vLLM's own.
        self.copied = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(copy_stream):
            copy_stream.wait_stream(main_stream)
            self.on_cpu = [
                replace(part, values=part.values.to("cpu", non_blocking=True))
                for part in embeddings
            ]
            self.copied.record(copy_stream)

    def get_output(self) -> ModelRunnerOutput:
        """vLLM's output, when it is on the CPU, with the embeddings."""
        result = self.output.get_output()
        self.copied.synchronize()
        result.pooler_output = Embeddings.in_order(self.on_cpu, result.req_ids)
        return result
