"""Whose fault an error is: what is meant for the user is shown as one line. Imports no torch: errors stay fast."""

from __future__ import annotations

import errno
import sys


class ExperimentError(ValueError):
    """Options, prompts or result files cannot be used; the text says what was expected, what came and what to do."""


def meant_for_the_user(error: BaseException) -> bool:
    """Errors of the library and of experiments, missing files and memory; anything else is a bug.

    The library's errors are looked up without importing torch for them.
    """
    if isinstance(error, OSError):
        return error.errno != errno.EPIPE  # a closed pipe (`| head`) ends the program quietly: click sees to it
    known: list[type[Exception]] = [ExperimentError]
    if "specdec.pairing.errors" in sys.modules:
        known.append(sys.modules["specdec.pairing.errors"].PairError)
    if "specdec.kv.errors" in sys.modules:
        known.append(sys.modules["specdec.kv.errors"].SpecdecError)
    if "torch" in sys.modules:
        known.append(sys.modules["torch"].OutOfMemoryError)
    return isinstance(error, tuple(known))
