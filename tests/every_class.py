"""Every class of `transformers` that generates text, in miniature: its drafted text is plain `generate`'s, or it is
refused by name. Run from the root: `python tests/every_class.py [CLASS ...]`; some minutes, exit status 1 for a text
that differs or an error that is no refusal."""

from __future__ import annotations

import signal
import sys
import warnings
from collections import Counter
from typing import Any

import torch
import transformers as tf
from families import NAMES, small_model
from test_families import compare

from specdec import Speculator, UnsupportedModelError

SECONDS = 60
"""For one class; some cannot be made small by their configuration's usual fields."""
_ENDINGS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "WithLMHead")


def verdict(name: str) -> tuple[str, str]:
    """What became of the class, and a line about it."""
    try:
        model: Any = small_model(name)
    except Exception as fault:
        return "not built", f"{type(fault).__name__}: {fault}"
    if model.config.get_text_config(decoder=True)._attn_implementation == "eager":
        model = model.float()  # in float64 eager attention makes NaN of padded rows
    try:
        Speculator(model, "ngram")
    except UnsupportedModelError as refusal:
        return "refused", str(refusal)
    try:
        compare(model)
    except TimeoutError as slow:
        return "too slow", str(slow)
    except (Exception, AssertionError) as fault:
        return "DIFFERS", f"{type(fault).__name__}: {fault}"
    return "equal", ""


def _ring(*signal_and_frame: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _ring)
    counts: Counter[str] = Counter()
    for name in names or sorted(name for name in dir(tf) if name.endswith(_ENDINGS) and name not in NAMES):
        signal.alarm(SECONDS)
        what, why = verdict(name)
        signal.alarm(0)
        counts[what] += 1
        print(f"{what:10} {name} {' '.join(why.split())[:200]}", flush=True)
    print(dict(counts))
    return 1 if counts["DIFFERS"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
