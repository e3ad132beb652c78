"""K/V in 8 bits: a code for every number, and a scale for every few numbers of one token in one head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.kv.errors import UnsupportedArgumentError

GROUP = 32
"""Numbers of a head that share a scale. One for a whole head of 64 errs twice as much: rotary positions make pairs of
its two halves, and keys are not as large in the one as in the other (measured, see the log)."""


@dataclass(frozen=True)
class Quantised:
    """How keys and values are kept: `[..., head_dim]` in any dtype as int8 `[..., head_dim + 2 * groups]`, first the
    codes, then the groups' scales, bfloat16. A number is read as code * scale.

    **Lossy.** What a slot holds is a function of that token's own states alone, computed when they are written: neither
    its neighbours in a page nor the rest of the pass enter, so what is read does not depend on who drafted it. (KIVI,
    arXiv 2402.02750, errs half as much with scales per channel and page; with those it would.)

    Args:
        codes: dtype of a code; largest: the code of a group's largest number.
        native: numbers of a head, at most, that native passes read so (WIDEST of quantised.h); 0: none.
    """

    name: str
    codes: torch.dtype
    largest: float
    native: int

    @property
    def loss(self) -> str:
        """What is lossy about it, for reports."""
        return f"K/V in {self.name}"

    def width(self, size: int) -> int:
        """Bytes of `size` numbers of one token and head."""
        return size + 2 * -(-size // GROUP)

    def pack(self, states: Tensor) -> Tensor:
        """The bytes of `states`. Where they are not finite, what is read is not finite either."""
        size = states.shape[-1]
        grouped = pad(states.float(), (0, -size % GROUP)).unflatten(-1, (-1, GROUP))
        scales = (grouped.abs().amax(-1) / self.largest).to(torch.bfloat16)
        factors = scales.float().unsqueeze(-1)
        codes = torch.where(factors > 0, grouped / factors, 0.0).clamp(-self.largest, self.largest)
        codes = (codes.round() if self.codes is torch.int8 else codes).to(self.codes).view(torch.int8)
        return torch.cat((codes.flatten(-2)[..., :size], scales.view(torch.int8)), -1)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """What such bytes are read as, in `dtype`."""
        size = packed.shape[-1] - 2 * -(-packed.shape[-1] // (GROUP + 2))
        codes = pad(packed[..., :size], (0, -size % GROUP)).view(self.codes)
        scales = packed[..., size:].contiguous().view(torch.bfloat16).float().unsqueeze(-1)
        return (codes.unflatten(-1, (-1, GROUP)).float() * scales).flatten(-2)[..., :size].to(dtype)


QUANTISED = {
    "int8": Quantised("int8", torch.int8, 127.0, native=256),
    "fp8": Quantised("fp8", torch.float8_e4m3fn, 448.0, native=0),
}


def quantised(name: str | None, lossy: bool) -> Quantised | None:
    """The format of this name; None for K/V as the models compute it.

    Args:
        lossy: whether the user agreed to another law of the text.

    Raises:
        UnsupportedArgumentError: an unknown name, no agreement, or agreement where nothing is lossy.
    """
    if name is None:
        if lossy:
            raise UnsupportedArgumentError(
                "lossy=True: K/V is kept as the models compute it, nothing is lossy. Leave lossy out, or say "
                "kv_dtype='int8'"
            )
        return None
    if not isinstance(name, str) or name not in QUANTISED:
        raise UnsupportedArgumentError(f"kv_dtype: expected one of {list(QUANTISED)} or None, got {name!r}")
    if not lossy:
        raise UnsupportedArgumentError(
            f"kv_dtype={name!r} is lossy: it rounds keys and values to 8 bits, and texts follow another law than the "
            "target's. Pass lossy=True if that is what you want, or leave kv_dtype out"
        )
    return QUANTISED[name]
