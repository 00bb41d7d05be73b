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

    A layer's weights are gathered while it computes. What is trained, in the modes ``adapter`` and
    ``lora``, stays whole in every process and is left to DDP, to which the sharded weights are no
    concern.

    Raises:
        GemError: the run has no frozen base, or its processes would not go through it in step.
    """
    if peers.count() == 1:
        raise GemError("--shard spreads the base over processes; start several by torchrun")
    if options.mode == "full":
        raise GemError("--shard spreads a frozen base: give --mode adapter or lora")
    # The processes gather layers together, so each must go through them as often as the others.
    if options.pairs is not None:
        raise GemError("--shard does not go with --pairs")
    if isinstance(model, AdapterModel) and options.raw_share != 0.0:
        raise GemError("--shard does not go with --raw-share other than 0 in --mode adapter")
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (peers.count(),))
    for layer in model.base.get_decoder().layers:
        trained = {weight for weight in layer.parameters() if weight.requires_grad}
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    names = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
