"""The ranks that hold one target together, and the broadcast by which the first tells the others what comes next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from specdec.kv.errors import LeadingRankError, UnsupportedArgumentError, UnsupportedModelError

ROOM = 16 << 10
"""Bytes of a broadcast. What is longer (trees of some thousand nodes) takes a second one."""
_HEAD = 8
"""Of them, the length of the message."""


class Ranks:
    """The processes of one tensor-parallel group, seen from one of them.

    Args:
        group: torch's process group. device: where its collectives want their tensors.

    Attributes:
        leads: whether this is the group's first rank. size: how many there are.
        awaited: whether the others are waiting for this rank's next message.
    """

    def __init__(self, group: Any, device: torch.device):
        self._group, self._device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.leads = self.rank == 0
        self.awaited = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell all others. `message`: ready for JSON."""
        data = json.dumps(message, separators=(",", ":")).encode()
        head, rest = data[: ROOM - _HEAD], data[ROOM - _HEAD :]
        packed = len(data).to_bytes(_HEAD, "little") + head
        self._broadcast(_bytes(packed + bytes(ROOM - len(packed))))
        if rest:
            self._broadcast(_bytes(rest))
        self.awaited = False

    def receive(self) -> dict[str, Any]:
        """What the first rank tells next.

        Raises:
            LeadingRankError: it failed.
        """
        packed = self._broadcast(torch.empty(ROOM, dtype=torch.uint8))
        length = int.from_bytes(packed[:_HEAD], "little")
        data = packed[_HEAD : _HEAD + length]
        if length > len(data):
            data += self._broadcast(torch.empty(length - len(data), dtype=torch.uint8))
        message: dict[str, Any] = json.loads(data)
        if "failed" in message:
            raise LeadingRankError(f"the first rank, which decides for all, failed: {message['failed']}")
        return message

    def tell_failure(self, fault: BaseException) -> None:
        """The others, if they wait, shall not wait for ever. (In a pass of the target they do not.)"""
        if self.awaited:
            self.send({"failed": f"{type(fault).__name__}: {fault}"})

    @contextmanager
    def call(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Around one call, which every rank makes.

        Args:
            given: what must be the same everywhere, by the name a user knows it under; ready for JSON.

        Raises:
            UnsupportedArgumentError: it is not; on every rank.
        """
        own = torch.tensor([_digest(value) for value in given.values()], device=self._device)
        everywhere = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everywhere, own, group=self._group)
        for name, values in zip(given, torch.stack(everywhere, dim=1).tolist(), strict=True):
            if len(set(values)) > 1:
                raise UnsupportedArgumentError(
                    f"{name}: expected the same on all {self.size} ranks that hold the target, got "
                    f"{len(set(values))} different ones: make the same call with the same arguments on every rank"
                )
        self.awaited = self.leads
        try:
            yield
        except BaseException as fault:
            self.tell_failure(fault)
            raise
        finally:
            self.awaited = False

    def _broadcast(self, data: torch.Tensor) -> bytes:
        data = data.to(self._device)
        dist.broadcast(data, group=self._group, group_src=0)
        return b"" if self.leads else data.cpu().numpy().tobytes()


def ranks_of(model: PreTrainedModel) -> Ranks | None:
    """The ranks that hold `model`; None where this process has all of it.

    Raises:
        UnsupportedModelError: it is sharded in another way than by tensor parallelism.
    """
    mesh: Any = getattr(model, "_device_mesh", None)
    if mesh is None or not dist.is_initialized():
        return None
    names = mesh.mesh_dim_names or ("tp",)
    sizes = {name: mesh.size(place) for place, name in enumerate(names)}
    tensor_parallel = getattr(model, "_tp_size", None) or 1
    others = [f"{name}={size}" for name, size in sizes.items() if size > 1 and (name != "tp" or tensor_parallel == 1)]
    if others:
        raise UnsupportedModelError(
            f"target: {type(model).__name__} is sharded by {', '.join(others)}; only tensor parallelism is served "
            "(DistributedConfig(tp_size=...) alone): load it so, or use plain generate"
        )
    if tensor_parallel == 1:
        return None
    group = mesh["tp"].get_group() if mesh.ndim > 1 else mesh.get_group()
    return Ranks(group, torch.device(mesh.device_type, torch.accelerator.current_device_index())
                 if mesh.device_type != "cpu" else torch.device("cpu"))  # fmt: skip


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _digest(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
