"""A base spread over several processes, so that each holds a part of it (FSDP2)."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from gem_vllm.errors import GemError
from gem_vllm.training import peers
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.trainer import GemTrainer


def shard_base(model: GemTrainingModel, options: TrainOptions, device: torch.device) -> None:
    """Spread the base over all processes, and move to ``device`` what each holds of the model.

    The first process has read the weights. The model of the others is on the meta device; they
    never hold more of it than their part, and a layer while it is cut.

    A layer's weights are gathered while it computes. In the modes ``adapter`` and ``lora`` the
    layers' frozen weights are spread; what is trained stays whole in every process. In the mode
    ``full`` all weights are, with their gradients and the optimizer's state; whole stays the
    temperature alone.

    Raises:
        GemError: there is one process only.
    """
    if peers.count() == 1:
        raise GemError("--shard spreads the base over processes; start several by torchrun")
    # The processes gather layers together, so each must go through them as often as the others.
    model.in_step = True
    mesh = init_device_mesh(device.type, (peers.count(),))
    full = options.mode == "full"
    # Not the parameters themselves, which `fully_shard` moves to the device and cuts there.
    mine = model.named_parameters() if peers.rank() == 0 else ()
    read = {name: weight.detach() for name, weight in mine}
    for layer in model.base.get_decoder().layers:
        _allocate(layer, device)
        trained = {weight for weight in layer.parameters() if weight.requires_grad}
        # Where the model itself is not sharded each layer is a root, which would stay whole.
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=True,
            ignored_params=set() if full else trained,
        )
    _allocate(model, device)
    if full:
        # Embeddings, head (they may be one) and norm, as a group: none is called by itself.
        fully_shard(
            model, mesh=mesh, reshard_after_forward=True, ignored_params={model.log_temperature}
        )
        register_fsdp_forward_method(model, "embed")
    for tensor in chain(model.parameters(), model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)
    for name, weight in model.named_parameters():
        peers.deal_(weight, read.get(name), device)


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Memory for what is on the meta device; what is tied stays tied."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_meta:
            memory = torch.empty_like(tensor, device=device)
            if isinstance(tensor, nn.Parameter):
                memory = nn.Parameter(memory, requires_grad=tensor.requires_grad)
            torch.utils.swap_tensors(tensor, memory)


class ShardedTrainer(GemTrainer):
    """A `GemTrainer` of a model that `shard_base` has spread over the processes.

    Neither DDP nor accelerate's FSDP is around the model. Gradients of sharded weights are averaged
    by FSDP2, those of the others here. Checkpoints hold whole tensors, as those of other runs do:
    a run may go on with another number of processes, and without ``--shard``.
    """

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """It is there."""

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Made ready for autocast alone: accelerate's DDP refuses a model with sharded weights."""
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        model._is_accelerate_prepared = True
        return model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """``Trainer``'s, in the groups that it makes of whole weights.

        Newer versions of it make others of sharded ones, with which a run could not go on whole.
        """
        if self.optimizer is None:
            decays = set(self.get_decay_parameter_names(self.model))
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {
                    "params": [
                        weight
                        for name, weight in self.model.named_parameters()
                        if weight.requires_grad and (name in decays) == decay
                    ],
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                }
                for decay in (True, False)
            ]
            self.optimizer = kind(groups, **arguments)
            self._step_one_by_one()
        return self.optimizer

    def _step_one_by_one(self) -> None:
        """Sharded and whole weights do not go through one fused kernel."""
        for group in self.optimizer.param_groups:
            group["fused"] = group["foreach"] = False

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``Trainer``'s, and the mean of the processes' gradients of what is whole in each."""
        loss = super().training_step(model, *args, **kwargs)
        peers.average_(
            [
                weight.grad
                for weight in model.parameters()
                if weight.grad is not None and not isinstance(weight, DTensor)
            ]
        )
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """By the norm of all gradients, sharded and whole ones; returns it."""
        trained = [weight for weight in model.parameters() if weight.grad is not None]
        sharded = [weight for weight in trained if isinstance(weight, DTensor)]
        parts = [sharded, [weight for weight in trained if not isinstance(weight, DTensor)]]
        norms = [get_total_norm([weight.grad for weight in part]) for part in parts if part]
        norm = get_total_norm(
            [each.full_tensor() if isinstance(each, DTensor) else each for each in norms]
        )
        for part in parts:
            clip_grads_with_norm_(part, self.args.max_grad_norm, norm)
        return norm

    def trained_state(self) -> dict[str, torch.Tensor]:
        """As ``GemTrainer``'s, on the CPU: in the first process; empty tensors in the others."""
        return {name: peers.whole(value) for name, value in self.model.state_dict().items()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is trained, gathered by all processes and written by the first."""
        state = self.trained_state()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """In the form of ``Trainer``'s own, with whole tensors."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            index: {name: peers.whole(value) for name, value in of_weight.items()}
            for index, of_weight in optimizer["state"].items()
        }
        for group in optimizer["param_groups"]:
            group["fused"] = group["foreach"] = None  # whichever suits the run that goes on
        if self.args.should_save:
            torch.save(optimizer, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Each process takes its part of what the file maps; no device holds all of it."""
        if checkpoint is None:
            return
        file = Path(checkpoint) / OPTIMIZER_NAME
        optimizer = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        for index, of_weight in optimizer["state"].items():
            for name, value in of_weight.items():
                if value.shape == weights[index].shape:
                    of_weight[name] = peers.sharded_like(weights[index], value)
        self.optimizer.load_state_dict(optimizer)
        self._step_one_by_one()
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
