"""What does a pass over N tokens cost, by each way there is to run it? `python -m specdec.experiments.passes`.

Four ways on the same model, the same cache and the same tokens, taking turns: `transformers`' modules as they are; the
same modules with folded attention and linear layers for few rows; straight over the parameters; and natively. A
verify pass of 2-5 tokens should cost little more than one token: that is what speculation lives on. Prints one table
per model and writes a JSON file with its provenance.
"""

from __future__ import annotations

import statistics
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

from specdec.experiments.clock import timed
from specdec.experiments.display import table, tracked
from specdec.experiments.frame import Command, ResultFile, option, started
from specdec.experiments.pair import PairOptions
from specdec.kv import SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify.native.library import why_not
from specdec.verify.passes.choose import every_way
from specdec.verify.passes.forward import Forward

NAMES = {"transformers": "modules", "modules": "modules", "direct": "direct", "native": "native"}
"""What is compared, and by which runner: `transformers` are the modules as they are outside of `prepared`, with their
own attention and linear layers."""


def ways(model: PreTrainedModel) -> dict[str, Forward]:
    """The ways there are on this machine."""
    return {
        name: Forward(model, "model", every_way(model)[runner])
        for name, runner in NAMES.items()
        if name != "native" or why_not() is None
    }


@dataclass(frozen=True, kw_only=True)
class PassOptions(PairOptions):
    """What is timed: passes over `widths` tokens per row, behind `slots` cached ones."""

    slots: Annotated[int, option("Tokens in the cache before the pass.")] = 200
    rows: Annotated[int, option("Rows of a pass.")] = 1
    widths: Annotated[tuple[int, ...], option("Tokens per row.")] = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
    repeats: Annotated[int, option("Timed passes of each way and width.")] = 21


def measure(model: PreTrainedModel, options: PassOptions) -> dict[str, Any]:
    """Milliseconds of a pass per way and width, every way in turn: median and fastest."""
    generator = torch.Generator().manual_seed(0)
    vocab, rows, slots = int(model.config.get_text_config().vocab_size), options.rows, options.slots
    text = torch.randint(0, vocab, (rows, slots), generator=generator)
    forwards = ways(model)
    layers, room = {"model": num_cache_layers(model)}, slots + max(options.widths)
    cached = {name: SharedKVCache(layers, rows, room) for name in forwards}
    times: dict[str, dict[int, list[float]]] = {name: {width: [] for width in options.widths} for name in forwards}
    with torch.no_grad():
        for name, forward in forwards.items():
            with nullcontext() if name == "transformers" else forward.prepared():
                forward.causal(cached[name], text, [0] * rows, None, keep=1)
        for width in tracked(options.widths, type(model).__name__):
            logits: dict[str, torch.Tensor] = {}
            tokens = torch.randint(0, vocab, (rows, width), generator=generator)
            for turn in range(options.repeats + 2):
                for name, forward in forwards.items():
                    run = partial(forward.causal, cached[name], tokens, [slots] * rows, None, keep=0)
                    with nullcontext() if name == "transformers" else forward.prepared():
                        run()  # as if in a call already
                        output, spent = timed(run)
                    logits[name] = output.logits
                    if turn > 1:  # the first ones measure forms and fill tables
                        times[name][width].append(spent.ms)
            spread = float(logits["transformers"].std())
            for name, own in logits.items():
                off = float((own - logits["transformers"]).abs().max())
                assert off < 1e-2 * spread, f"{name} computes something else: {off} of {spread}"
    return {
        f"{what}_ms": {name: {w: round(of(own[w]), 4) for w in options.widths} for name, own in times.items()}
        for what, of in (("median", statistics.median), ("fastest", min))
    }


def run(options: PassOptions) -> None:
    """What does a pass over N tokens cost, by each way there is to run it?"""
    result = ResultFile(options.out, "passes", started(options, slots=options.slots, rows=options.rows))
    models = options.load()
    for name, model in (("target", models.target), ("draft", models.draft)):
        result.content[name] = found = measure(model, options)
        medians, first = found["median_ms"], options.widths[0]
        print(f"{name}, median ms of {options.repeats} (times its own pass over {first})")
        rows = ([w, *(f"{own[w]:.2f} ({own[w] / own[first]:.2f})" for own in medians.values())] for w in options.widths)
        print("\n".join(table(["tokens", *medians], rows)), flush=True)
    result.finish()


main = Command(PassOptions, run)

if __name__ == "__main__":
    sys.exit(main())
