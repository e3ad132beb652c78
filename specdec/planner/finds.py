"""How often options that may be empty have something to propose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specdec.planner.options import Option

_WEIGHT, _MEMORY = 4.0, 0.95
"""Steps that what is believed before a call is worth, and what a step still weighs one step later."""


class Finds:
    """Per option, the share of rows it had a proposal for, slowly forgotten.

    Args:
        believed: by option's name; half where nothing is known.
    """

    def __init__(self, options: Sequence[Option], believed: Mapping[str, float]):
        self._options = options
        self._found = [_WEIGHT * believed.get(option.name, 0.5) for option in options]
        self._asked = [_WEIGHT] * len(options)

    def share(self, index: int) -> float:
        return self._found[index] / self._asked[index]

    def add(self, index: int, share: float) -> None:
        """It was asked in one step, and found something for this share of the rows."""
        self._found[index] = _MEMORY * self._found[index] + share
        self._asked[index] = _MEMORY * self._asked[index] + 1

    @property
    def known(self) -> dict[str, float]:
        """What the next call may begin with."""
        return {option.name: self.share(i) for i, option in enumerate(self._options) if option.may_be_empty}
