"""A frozen base spread over several processes, so that each holds a part of it."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gem_vllm.errors import GemError
from gem_vllm.training import peers
from gem_vllm.training.adapter_model import AdapterModel
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.options import TrainOptions


def shard_base(model: GemTrainingModel, options: TrainOptions) -> None:
    """Shard the decoder layers' frozen weights over all processes (FSDP2).

    A layer's weights are gathered while it computes. What is trained stays whole in every process
    and is left to DDP, to which the sharded weights are no concern.

    Raises:
        GemError: what is to be trained cannot be sharded.
    """
    if peers.count() == 1:
        raise GemError("--shard spreads the base over processes; start several by torchrun")
    if not isinstance(model, AdapterModel):
        raise GemError("--shard is for --mode adapter, whose base is frozen")
    if options.pairs is not None or options.raw_share != 0.0:
        # The processes gather layers together, so each must go through them as often as the others.
        raise GemError("--shard does not go with --pairs, nor with --raw-share other than 0")
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (peers.count(),))
    for layer in model.base.get_decoder().layers:
        trained = {weight for weight in layer.parameters() if weight.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    names = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
