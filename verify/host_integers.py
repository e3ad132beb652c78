"""Small integers on the host, large rows off it: what is cheapest depends on where the tensors live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_host(*tensors: Tensor) -> list[list[Any]]:
    """Integer or bool tensors `[rows, ...]` of one or two dimensions as lists, one for each of them.

    One synchronisation: off the CPU they travel packed into one tensor. On it nothing needs to travel, and packing
    would cost ten times what reading does.
    """
    if tensors[0].device.type == "cpu":
        return list(map(torch.Tensor.tolist, tensors))
    return packed(*tensors)


def packed(*tensors: Tensor) -> list[list[Any]]:
    """What `on_host` does off the CPU."""
    columns = [tensor if tensor.dim() == 2 else tensor[:, None] for tensor in tensors]
    lines = torch.cat([column.long() for column in columns], dim=1).tolist()
    out: list[list[Any]] = []
    first = 0
    for tensor, column in zip(tensors, columns, strict=True):
        stop = first + column.shape[1]
        out.append([line[first:stop] for line in lines] if tensor.dim() == 2 else [line[first] for line in lines])
        first = stop
    return out


def table(tensor: Tensor) -> Any:
    """A float32 tensor on a CPU as the NumPy array it shares its memory with; None for all others.

    NumPy finds the largest of 4096 floats in 1 microsecond where torch takes 5, and reads single entries in 0.1.
    """
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        return tensor.detach().numpy()
    return None


def argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(-1)`: the first index of each row's largest entry, or of its first NaN."""
    array = table(scores)
    return scores.argmax(-1) if array is None else torch.from_numpy(array.argmax(-1))


def entries(tensor: Tensor, places: Sequence[tuple[int, ...]]) -> list[float]:
    """The values of `tensor` at some index tuples."""
    array = table(tensor)
    if array is not None:
        return [float(array[place]) for place in places]
    values: list[float] = tensor[tuple(torch.tensor(places, device=tensor.device).unbind(1))].tolist()
    return values
