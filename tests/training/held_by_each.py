"""Run by `test_processes.py` in several processes: which share of the model each holds.

The first alone may read the base's weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from gem_vllm.training import peers
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run import join_processes, make_trainer


def main() -> None:
    """Print the share, a JSON line, in the first process."""
    base, data, out, mode = sys.argv[1:]
    join_processes()
    options = TrainOptions(
        base=Path(base), data=(data,), out=Path(out), mode=mode, batch_size=8, shard=True
    )
    with pytest.MonkeyPatch.context() as patch:
        if peers.rank() > 0:
            patch.delattr(AutoModelForCausalLM, "from_pretrained")
        trainer, _, _ = make_trainer(options, progress=False)
    # A pass gathers a layer's weights, and lets them go.
    with torch.no_grad():
        trainer.model.embed(torch.tensor([[5, 6, 7]]), torch.tensor([3]))
    if mode == "full":
        weights = list(trainer.model.parameters())
    else:
        layers = trainer.model.base.get_decoder().layers
        weights = [weight for weight in layers.parameters() if not weight.requires_grad]
    here = sum(
        (weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights
    )
    share = here / sum(weight.numel() for weight in weights)
    if peers.rank() == 0:
        print(json.dumps(share))


if __name__ == "__main__":
    main()
