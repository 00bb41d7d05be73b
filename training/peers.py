"""Processes that train one model together: each computes a part of every batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in the order of their ranks, with gradients to each one's own.

    rows: [n, d], n differing by process. Returns [sum of n, d]. The gradient of a process's rows is
    the sum over what all processes made of them, so that the mean of the processes' losses, whose
    gradients DDP averages, has the gradients that one process has with the whole batch.
    """
    return rows if count() == 1 else _Gather.apply(rows)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, without gradients."""
    values = values.detach().clone()
    if count() > 1:
        dist.all_reduce(values)
    return values


def largest(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers; they talk through ``device``."""
    found = torch.tensor(number, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def average_(tensors: list[torch.Tensor]) -> None:
    """Each becomes its mean over all processes, which give as many, of the same shapes."""
    if count() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, mean in zip(tensors, (flat / count()).split(sizes), strict=True):
        tensor.copy_(mean.view_as(tensor))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU in the first process, gathered where it is sharded; empty in the others.

    All processes must call it.
    """
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu() if rank() == 0 else tensor.new_empty(0)


def sharded_like(weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is whole in every process, spread as ``weight`` is, if that is sharded.

    Each process cuts its own part: nothing is sent.
    """
    if not isinstance(weight, DTensor):
        return tensor
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


@torch.no_grad()
def deal_(weight: torch.Tensor, read: torch.Tensor | None, device: torch.device) -> None:
    """Fill ``weight``, or each process's part where it is sharded, with what the first has read.

    read: of ``weight``'s whole shape, on any device; None in the others.
    """
    if read is None:
        read = torch.empty(weight.shape, dtype=weight.dtype, device=device)
    read = read.detach().to(device)
    if isinstance(weight, DTensor):
        part = distribute_tensor(read, weight.device_mesh, weight.placements)
        weight.to_local().copy_(part.to_local())
    else:
        dist.broadcast(read, 0)
        weight.copy_(read)


class _Gather(torch.autograd.Function):
    """As `gather`. torch's own all_gather with gradients wants rows of one number everywhere."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor) -> torch.Tensor:
        lengths = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(count())]
        dist.all_gather(lengths, torch.tensor(len(rows), device=rows.device))
        sizes = [int(length) for length in lengths]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        context.start, context.length = sum(sizes[: rank()]), len(rows)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[context.start : context.start + context.length]
