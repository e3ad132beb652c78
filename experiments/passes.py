"""What does a pass over N tokens cost, by each way there is to run it? `python -m specdec.experiments.passes`.

Four ways on the same model, the same cache and the same tokens, taking turns: `transformers`' modules as they are; the
same modules with folded attention and linear layers for few rows; straight over the parameters; and natively. A
verify pass of 2-5 tokens should cost little more than one token: that is what speculation lives on. Prints one table
per model and writes a JSON file with its provenance.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
from transformers import PreTrainedModel

from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.pair import Pair
from specdec.experiments.provenance import provenance
from specdec.kv import SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify.native.library import why_not
from specdec.verify.passes.choose import every_way
from specdec.verify.passes.forward import Forward

RESULTS = Path(__file__).parent / "results"
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)


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


def measure(model: PreTrainedModel, slots: int, widths: Sequence[int], repeats: int, rows: int) -> dict[str, Any]:
    """Median milliseconds of a pass per way and width, every way in turn, behind `slots` cached tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab = int(model.config.get_text_config().vocab_size)
    text = torch.randint(0, vocab, (rows, slots), generator=generator)
    forwards = ways(model)
    names = list(forwards)
    cached = {name: SharedKVCache({"model": num_cache_layers(model)}, rows, slots + max(widths)) for name in names}
    times: dict[str, dict[int, list[float]]] = {name: {width: [] for width in widths} for name in names}
    logits: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, forward in forwards.items():
            with nullcontext() if name == "transformers" else forward.prepared():
                forward.causal(cached[name], text, [0] * rows, None, keep=1)
        for width in tqdm(widths, desc=type(model).__name__, leave=False):
            tokens = torch.randint(0, vocab, (rows, width), generator=generator)
            for turn in range(repeats + 2):
                for name, forward in forwards.items():
                    with nullcontext() if name == "transformers" else forward.prepared():
                        forward.causal(cached[name], tokens, [slots] * rows, None, keep=0)  # as if in a call already
                        start = perf_counter()
                        logits[name] = forward.causal(cached[name], tokens, [slots] * rows, None, keep=0).logits
                        if turn > 1:  # the first ones measure forms and fill tables
                            times[name][width].append(1e3 * (perf_counter() - start))
            spread = float(logits["transformers"].std())
            for name in names:
                off = float((logits[name] - logits["transformers"]).abs().max())
                assert off < 1e-2 * spread, f"{name} computes something else: {off} of {spread}"
    found = {name: {w: round(statistics.median(own[w]), 4) for w in widths} for name, own in times.items()}
    fastest = {name: {w: round(min(own[w]), 4) for w in widths} for name, own in times.items()}
    return {"median_ms": found, "fastest_ms": fastest}


def table(found: dict[str, Any], widths: Sequence[int]) -> str:
    """Milliseconds, and in brackets how many single tokens that is."""
    lines = ["| tokens | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for width in widths:
        cells = [f"{own[width]:.2f} ({own[width] / own[widths[0]]:.2f})" for own in found.values()]
        lines.append(f"| {width} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m specdec.experiments.passes", description=__doc__)
    parser.add_argument(
        "--pair", default=BenchOptions().pair, help="pair by name, file or folder (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slots", type=int, default=200, help="tokens in the cache before the pass")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="tokens per row")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    pair = Pair.load(BenchOptions(pair=args.pair))
    result: dict[str, Any] = {"provenance": provenance(seed=0, threads=args.threads, slots=args.slots, rows=args.rows)}
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        result[name] = measure(model, args.slots, args.widths, args.repeats, args.rows)
        print(f"{name}, median ms of {args.repeats} (times its own pass over {args.widths[0]})")
        print(table(result[name]["median_ms"], args.widths), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"passes-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
