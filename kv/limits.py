"""How large what a user asks for may be: one constant per limit, and checks that come before anything is built."""

from __future__ import annotations

import math
import operator
import os
from numbers import Real
from typing import Any

import torch

from specdec.kv.errors import UnsupportedArgumentError

MOST_NODES = 1024
"""Drafted tokens per row and step, as a chain or a tree. A pass computes logits for each of them, a tree pass a mask of
all against all; far smaller drafts are the fastest ones."""
MOST_SLOTS = 4096
"""Slots of a row's K/V in which a drafter may run nodes while it grows a tree, those it drops included."""
MOST_NGRAM = 64
"""Longest n-gram looked up: every token of a text is indexed once per length."""
MOST_PAGES = 1 << 24
"""Pages of a pool: what is known of each lies in lists."""
MOST_ROWS = 4096
"""Requests an engine runs at once."""
MOST_STEP_TOKENS = 1 << 20
"""Tokens of the target in one step of an engine."""
MOST_THREADS = 1024
"""Threads of a CPU, for commands and checks that set them."""
MOST_WAITING = 1 << 31
"""Requests that may wait in an engine."""


def checked_count(name: str, value: Any, least: int, most: int, instead: str = "") -> int:
    """`value` as an int: whatever Python takes as an index (ints, NumPy's, tensors of one integer), but no bool.

    Args:
        instead: what to do, appended to the message.

    Raises:
        UnsupportedArgumentError: not a whole number, or outside `least` to `most`.
    """
    hint = f"; {instead}" if instead else ""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise UnsupportedArgumentError(
            f"expected a whole number {name} >= {least} and <= {most}, got {type(value).__name__} {shown(value)}{hint}"
        ) from None
    if not least <= count <= most:
        raise UnsupportedArgumentError(f"expected {name} >= {least} and <= {most}, got {shown(count)}{hint}")
    return count


def checked_number(name: str, value: Any, least: float, most: float = math.inf, *, above: bool = False) -> float:
    """`value` as a finite float.

    Args:
        above: `least` itself is refused.

    Raises:
        UnsupportedArgumentError: no real number (bools, NaN and infinity are none), or one out of range.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    number = float(value) if real and abs(value) < 1e300 else math.nan
    if not (least < number if above else least <= number) or not number <= most:
        bounds = f"{'>' if above else '>='} {least:g}" + (f" and <= {most:g}" if most < math.inf else "")
        raise UnsupportedArgumentError(f"{name}: expected a number {bounds}, got {shown(value)}")
    return number


def memory_of(device: torch.device) -> int:
    """Bytes of memory that `device` has in all, used or not; 2**63 where that cannot be found out."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else 1 << 63
    except (AttributeError, OSError, ValueError):  # Windows
        return 1 << 63


def shown(value: Any) -> str:
    """`value` in a message: never longer than a line, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # integers of thousands of digits in it
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nodes_of_widths(widths: tuple[int, ...]) -> int:
    """Drafted tokens of a tree whose nodes have `widths[d]` children at level d; counting ends beyond MOST_NODES."""
    total, level = 0, 1
    for width in widths:
        level *= width
        total += level
        if total > MOST_NODES:
            break
    return total
