"""How the passes of a call were computed, for its report: which way, over which weights, in what precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from specdec.verify.packed import PackedLinear
from specdec.verify.passes.linear import is_dense

_WORDS = {
    "native": "natively",
    "direct": "by torch straight over the parameters",
    "modules": "through the model's modules",
    "strict": "through the model's modules, row by row",
    "graphed": "as CUDA graphs",
}
_SHORT = ("bfloat16", "float16")


@dataclass(frozen=True)
class WeightForm:
    """Weights of one form, and their bytes. form: a dtype, "8 bits" or "4 bits" (`Packed`), or what a quantiser calls
    its tensors."""

    form: str
    num_bytes: int


@dataclass(frozen=True)
class PassesReport:
    """How the target's passes were computed.

    Attributes:
        way: which most of them took: "native", "direct" (the same operations of torch as the modules', past them),
            "modules", "strict" or "graphed".
        num_passes, num_native: all of them, and those that were native.
        weights: what is read in a pass of that way, the largest part first.
        sums: dtype in which sums were made; "torch": as torch's products make them.
        states: dtype to which states are rounded where the model's modules round them.
    """

    way: str = ""
    num_passes: int = 0
    num_native: int = 0
    weights: list[WeightForm] = field(default_factory=list)
    sums: str = "torch"
    states: str = ""

    def line(self) -> str:
        """The same for people."""
        count = self.num_native if self.way == "native" else self.num_passes
        some = f"{count} of {self.num_passes}" if count < self.num_passes else str(count)
        weights = " and ".join(f"{own.num_bytes / 2**20:.1f} MiB in {own.form}" for own in self.weights)
        sums = "as torch makes them" if self.sums == "torch" else f"in {self.sums}"
        rounded = f", states rounded to {self.states} as by the modules" if self.states in _SHORT else ""
        return f"{some} {_WORDS.get(self.way, self.way)}; weights {weights}; sums {sums}{rounded}"


def account(way: str, counts: Mapping[str, int], weights: Mapping[str, int], sums: str, states: str) -> PassesReport:
    """Args: counts: passes by way. weights: bytes by form."""
    forms = [WeightForm(form, size) for form, size in sorted(weights.items(), key=lambda own: -own[1])]
    return PassesReport(way, sum(counts.values()), counts.get("native", 0), forms, sums, states)


def bytes_by_form(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's matrices by form (see `WeightForm`), each counted once."""
    found: dict[str, int] = {}
    seen = set[int]()
    for part in model.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is None or tensor.dim() < 2 or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            bits = f"{part.bits} bits" if isinstance(part, PackedLinear) else None
            form = bits or (name_of(tensor) if is_dense(tensor) else type(tensor).__name__)
            found[form] = found.get(form, 0) + sum(inner.nbytes for inner in _inner(tensor))
    return found


def name_of(tensor: Tensor) -> str:
    """Its dtype, without "torch."."""
    return str(tensor.dtype).removeprefix("torch.")


def _inner(tensor: Any) -> Iterator[Tensor]:
    """What a tensor that is made of others keeps in memory."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # a sharded weight names its mesh as well
            yield from _inner(part)
