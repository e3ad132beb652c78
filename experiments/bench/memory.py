"""Peak memory of one way, measured in a process of its own so that none inherits another's freed pages."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.processes import fresh_process
from specdec.experiments.ways import select

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """MiB of one `generate` call after a short warm-up call.

    loaded: resident with both models loaded and warm. peak: highest during the call. On a GPU, of its allocator.
    """

    peer: str
    loaded: float
    peak: float

    @property
    def added(self) -> float:
        """What the call itself needed: K/V, activations, logits, masks."""
        return self.peak - self.loaded


def measure_memory(names: Sequence[str], options: BenchOptions, advance: Callable[[str], None]) -> list[Memory]:
    """Peak memory of the named ways, one fresh process each, one after the other."""
    found = []
    for name in names:
        advance(name)
        with fresh_process() as process:
            found.append(process.submit(_in_child, name, options).result())
    return found


def _in_child(name: str, options: BenchOptions) -> Memory:
    import torch

    from specdec.experiments.bench.ways import all_ways

    torch.set_num_threads(options.threads)
    models = options.load()
    (way,) = select(all_ways(options.quick, options.k), [name])
    ids = options.prompts(models)[0].ids
    generate = way.ready(models, options)
    # The warm-up makes one-time costs (thread pools, kernels' scratch, lazily read weights) part of `loaded`.
    generate(ids[:, :8], options.seed)
    gc.collect()
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated() / MIB
        generate(ids, options.seed)
        return Memory(name, loaded, torch.cuda.max_memory_allocated() / MIB)
    _reset_peak()
    loaded = _status("VmRSS")
    generate(ids, options.seed)
    return Memory(name, loaded, max(loaded, _status("VmHWM")))


def _reset_peak() -> None:
    """Make VmHWM start again from the present (Linux); elsewhere the peak of the whole life is what there is."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _status(field: str) -> float:
    """MiB of VmRSS or VmHWM; the lifetime peak where there is no /proc."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    scale = MIB if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
