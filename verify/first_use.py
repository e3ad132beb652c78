"""Says, once per process, why a call takes longer: it is the first of its kind on this machine."""

from __future__ import annotations

import logging
from functools import cache

LOGGER = logging.getLogger("specdec")


@cache
def say_first_use() -> None:
    """To be called before something is compiled, or measured at length, that later processes find in the cache folder.

    A warning, so that it is seen where nobody has set up logging: a first call would otherwise seem to hang.
    """
    LOGGER.warning(
        "specdec: first use of this model on this machine; compiling and measuring take some seconds, once "
        "(`specdec warmup MODEL` does it beforehand)"
    )
