"""The forms of a lean copy, by name: `int8`, `int4`, `exit8`, `skip8-20`, `hot30`, `wanda50`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from specdec.kv.errors import UnsupportedArgumentError

Kind = Literal["int8", "int4", "exit", "skip", "hot", "wanda"]

PREFIX = "self:"
KNOWN = (
    "'self:int8' and 'self:int4' (all linear layers in 8 or 4 bits), 'self:exit8' (the first 8 layers alone), "
    "'self:skip8-20' or 'self:skip3,7-9' (without those layers, counted from 0), 'self:hot30' (30 % of the neurons of "
    "every MLP), 'self:wanda50' (50 % of every weight pruned)"
)
_NAMES = re.compile(r"(?P<bits>int8|int4)|(?P<kind>exit|hot|wanda)(?P<number>\d{1,5})|skip(?P<layers>[\d,-]+)")


@dataclass(frozen=True)
class Form:
    """How a lean copy is made.

    Attributes:
        name: as the user wrote it, without `self:`.
        number: of "exit" the layers that are kept, of "hot" the neurons that are kept and of "wanda" the weights that
            are pruned, in percent.
        layers: of "skip", those that are left out.
    """

    name: str
    kind: Kind
    number: int = 0
    layers: frozenset[int] = frozenset()

    @staticmethod
    def parse(name: str) -> Form:
        """The form a name means, e.g. `Form.parse("skip3,7-9").layers == {3, 7, 8, 9}`.

        Raises:
            UnsupportedArgumentError: an unknown name, with the known ones.
        """
        name = name.removeprefix(PREFIX)
        found = _NAMES.fullmatch(name)
        if found is None:
            raise UnsupportedArgumentError(f"draft: expected a form of the target itself, {KNOWN}; got {name!r}")
        if found["bits"]:
            return Form(name, "int8" if found["bits"] == "int8" else "int4")
        if found["layers"]:
            return Form(name, "skip", layers=_numbers(name, found["layers"]))
        number = int(found["number"])
        if found["kind"] == "exit":
            return Form(name, "exit", number)
        if not 0 < number < 100:
            raise UnsupportedArgumentError(f"draft 'self:{name}': expected between 1 and 99 percent, got {number}")
        return Form(name, "hot" if found["kind"] == "hot" else "wanda", number)

    def kept_layers(self, count: int) -> list[int]:
        """Which of a model's `count` layers the copy has.

        Raises:
            UnsupportedArgumentError: none, or layers that are not there.
        """
        if self.kind == "exit":
            if not 0 < self.number < count:
                raise UnsupportedArgumentError(
                    f"draft 'self:{self.name}': expected between 1 and {count - 1} layers of the target's {count}"
                )
            return list(range(self.number))
        if self.layers and (max(self.layers) >= count or len(self.layers) == count):
            raise UnsupportedArgumentError(
                f"draft 'self:{self.name}': expected some of the target's layers 0 to {count - 1}, and not all of them"
            )
        return [layer for layer in range(count) if layer not in self.layers]

    @property
    def words(self) -> str:
        """What the copy is, e.g. "the target in 8 bits"."""
        return {
            "int8": "the target in 8 bits",
            "int4": "the target in 4 bits",
            "exit": f"the target's first {self.number} layers",
            "skip": f"the target without {len(self.layers)} of its layers",
            "hot": f"the target with {self.number} % of its neurons",
            "wanda": f"the target without {self.number} % of its weights",
        }[self.kind]


def _numbers(name: str, text: str) -> frozenset[int]:
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or len(part) > 11:
            raise UnsupportedArgumentError(f"draft 'self:{name}': expected layers such as 8-20 or 3,7-9, got {part!r}")
        if dash and int(last) < int(first):
            raise UnsupportedArgumentError(f"draft 'self:{name}': expected the lower layer first, got {part!r}")
        numbers.update(range(int(first), int(last or first) + 1))
    return frozenset(numbers)
