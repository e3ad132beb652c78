"""What a step costs on this machine with these models, measured while the engine runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import exp, log, log2, sqrt
from statistics import median

import numpy as np

_KEEP = 5
"""Latest times of one kind of step that are remembered."""
_REFIT = 8
"""The linear model is fitted anew every so many steps."""
_FOLLOW = 0.2
"""How fast the machine's speed is followed, per step."""
_COMPARED = 3
"""Times of a kind from which on its next one says something about the machine's speed."""
_SURPRISES = 9
"""Latest such steps, whose median says it: a single one may have been interrupted."""
_SURE = 3
"""Times of a kind from which on they alone are believed."""
_LEAST = 1e-3
"""No step is believed to cost less, in units of cost."""
_NEAR = 0.6
"""Kinds of as many levels that differ by less in log2 of their tokens know each other's cost."""


class StepCosts:
    """Costs of decoding steps, by tokens in the target's pass and drafted levels.

    A machine that does something else besides gets slower for all steps alike; what matters here are ratios. So times
    are kept relative to the speed of the moment (`scale`), about which a step tells something once its kind is known.
    The first step of a kind is not believed: kernels, buffers and forms of products are chosen then, at a hundred times
    its cost. Kinds that were seen are believed as measured; others follow `a + b tokens + c sqrt(tokens) + d levels`,
    fitted to those (small passes are cheap by the token where weights are read once, larger ones by better kernels),
    corrected by what the nearest kinds were found to cost.

    Attributes:
        scale: seconds per unit of cost, now.
    """

    def __init__(self) -> None:
        self.scale = 1.0
        self._seen: dict[tuple[int, int], deque[float]] = {}
        self._line = (0.8, 0.02, 0.1, 0.1)
        self._surprises: deque[float] = deque(maxlen=_SURPRISES)
        self._steps = 0

    def observe(self, tokens: int, levels: int, seconds: float) -> None:
        """A step took so long."""
        kind = _kind(tokens, levels)
        seconds = max(seconds, 1e-9)  # a clock may be too coarse for a step
        times = self._seen.get(kind)
        if times is None:
            self._seen[kind] = deque(maxlen=_KEEP)
            return
        if not any(self._seen.values()):
            self.scale = seconds / self.cost(tokens, levels)
        if times and seconds < 0.5 * min(times) * self.scale:
            times.clear()  # what took twice as long was still the start: the drafter has first passes, too
        if len(times) >= _COMPARED:
            self._surprises.append(seconds / (median(times) * self.scale))
            self.scale *= min(2.0, max(0.5, median(self._surprises))) ** _FOLLOW
        times.append(seconds / self.scale)
        self._steps += 1
        if self._steps % _REFIT == 0:
            self._fit()

    def cost(self, tokens: int, levels: int) -> float:
        """What such a step will take, in units of `scale`."""
        times = self._seen.get(_kind(tokens, levels))
        if not times:
            return self._guess(tokens, levels)
        if len(times) >= _SURE:  # the usual case, for every depth of every step: a guess looks at all kinds
            return _typical(times)
        weight = len(times) / _SURE
        return weight * _typical(times) + (1 - weight) * self._guess(tokens, levels)

    def known(self, tokens: int, levels: int) -> bool:
        """Whether steps of about that size with so many levels were measured."""
        near = ((kind, times) for kind, times in self._seen.items() if _middle(kind)[1] == levels)
        return any(len(times) > 1 and abs(log2(_middle(kind)[0] / tokens)) < _NEAR for kind, times in near)

    def _guess(self, tokens: int, levels: int) -> float:
        """By the fit, and by how far it is off at kinds seen, the nearest ones first."""
        guess, total, off = self._fitted(tokens, levels), 0.0, 0.0
        for kind, times in self._seen.items():
            if times:
                its, own = _middle(kind)
                weight = exp(-3 * (abs(log2(its / tokens)) + 0.5 * abs(own - levels)))
                total += weight
                off += weight * log(_typical(times) / self._fitted(its, own))
        return guess * exp(off / total) if total else guess

    def _fitted(self, tokens: float, levels: int) -> float:
        value = sum(weight * feature for weight, feature in zip(self._line, _features(tokens, levels), strict=True))
        return max(_LEAST, value)  # a fit may put all of the cost into levels, and leave nothing

    def _fit(self) -> None:
        """Least squares over the kinds seen; no token or level is taken to save time."""
        rows = [(_middle(kind), _typical(times), len(times)) for kind, times in self._seen.items() if times]
        weight = np.sqrt([float(count) for _, _, count in rows])
        features = np.array([_features(*middle) for middle, _, _ in rows])
        times = np.array([time for _, time, _ in rows])
        used = [0, 1, 2, 3] if len(rows) > 4 else [0, 1, 3]
        while len(rows) > len(used):
            found, *_ = np.linalg.lstsq(features[:, used] * weight[:, None], times * weight, rcond=1e-9)
            negative = [i for i, value in zip(used, found, strict=True) if value < 0]
            if not negative:
                line = dict(zip(used, found.tolist(), strict=True))
                self._line = (line.get(0, 0.0), line.get(1, 0.0), line.get(2, 0.0), line.get(3, 0.0))
                return
            used = [i for i in used if i not in negative]


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: what disturbs a step makes it slower, and a depth that is not chosen any more keeps its first
    times, in which the drafter's passes of other widths were still being fitted to the machine."""
    return sorted(times)[len(times) // 4]


def _features(tokens: float, levels: int) -> tuple[float, float, float, float]:
    return 1.0, tokens, sqrt(tokens), levels


def _kind(tokens: int, levels: int) -> tuple[int, int]:
    """Steps that cost about the same: token counts in steps of an eighth to a quarter of their size."""
    return tokens // _width(tokens), levels * 4096 + _width(tokens)


def _middle(kind: tuple[int, int]) -> tuple[float, int]:
    """Tokens and levels of a kind."""
    levels, width = divmod(kind[1], 4096)
    return (kind[0] + 0.5) * width - 0.5, levels


def _width(tokens: int) -> int:
    return max(1, 1 << max(0, tokens.bit_length() - 3))
