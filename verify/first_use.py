"""Says why a call takes longer: it is the first of its kind on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain, repeat

LOGGER = logging.getLogger("specdec")
SAID = (
    "specdec: first use of this model on this machine; compiling and measuring take some seconds, once "
    "(`specdec warmup MODEL` does it beforehand)"
)
BEGINS, ENDS = "begins", "ends"
"""Values of `first_use` on the log's records, for who shows the wait in another way."""


@contextmanager
def first_use() -> Iterator[None]:
    """Around what is compiled, or measured at length, and what later processes find in the cache folder.

    The first time in a process is a warning, so that it is seen where nobody has set up logging: a first call would
    otherwise seem to hang.
    """
    LOGGER.log(next(levels()), SAID, extra={"first_use": BEGINS})
    try:
        yield
    finally:
        LOGGER.info("specdec: compiled or measured", extra={"first_use": ENDS})


@cache
def levels() -> Iterator[int]:
    """Of this process's records, one after the other."""
    return chain((logging.WARNING,), repeat(logging.INFO))
