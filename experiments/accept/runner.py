"""One experiment from options to exit code: what is left to do is done, by as many processes as were launched."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as hf_logging

from specdec.experiments.accept.cells import Cell, cells
from specdec.experiments.accept.logbook import log_unit
from specdec.experiments.accept.measure import Speculators, run_unit
from specdec.experiments.accept.models import Models
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.show import show
from specdec.experiments.accept.store import Store, unit_key
from specdec.experiments.provenance import provenance
from specdec.experiments.workloads import Prompt
from specdec.verify.passes.linear import FORMS


@dataclass(frozen=True)
class Share:
    """Which of `count` processes this one is, and where it computes."""

    rank: int
    count: int
    device: torch.device
    wait: Callable[[], None]

    @staticmethod
    def of(device: str) -> Share:
        """From the environment that `accelerate launch` (or torchrun, on CPUs) sets up; alone without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # type: ignore[import-untyped,unused-ignore]

            state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
            return Share(state.process_index, state.num_processes, state.device, state.wait_for_everyone)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        return Share(0, 1, torch.device(name), lambda: None)


def run(options: AcceptOptions) -> int:
    """Measure what is not measured yet, then print the table and write the report.

    Returns:
        0; 1 when a drafter failed (its cells then measure plain decoding in part).

    Raises:
        ExperimentError: prompts or the folder's files cannot be used; SpecdecError: models cannot.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    share = Share.of(options.device)
    store = Store(options.out, share.rank)
    if share.rank == 0:
        store.open(options.recorded())
    share.wait()
    if share.rank:
        store.open(options.recorded())
    source = provenance(
        seed=options.seed, threads=options.threads, device=str(share.device), pair=options.chosen_pair().name,
        options=options.to_dict(), rank=share.rank, num_processes=share.count,
    )  # fmt: skip
    models = Models.load(options, share.device)
    prompts = [p for wanted in options.sources() for p in wanted.load(models.tokenizer, options.num_prompts)]
    todo, skipped = plan(options, prompts, store.finished())
    share.wait()  # until all have read what is finished: nobody may add to it before the work is divided
    mine = todo[share.rank :: share.count]
    if mine:
        store.append("provenance", source)
    _work(options, models, store, mine)
    share.wait()
    if share.rank:
        return 0
    return _finish(options, store, skipped, len(todo))


Unit = tuple[Cell | None, float, Prompt]
"""A cell and a prompt; without a cell, the logged text of that temperature."""


def plan(options: AcceptOptions, prompts: list[Prompt], finished: set[str]) -> tuple[list[Unit], list[str]]:
    """The units that are not finished, and the combinations that are never run.

    Cells of one prompt and temperature stand together: what is compared runs close together in time.
    """
    wanted, skipped = cells(options)
    units: list[Unit] = []
    for prompt in prompts:
        for temperature in dict.fromkeys(options.temperatures):
            if options.log:
                units.append((None, temperature, prompt))
            units += [(cell, temperature, prompt) for cell in wanted if cell.temperature == temperature]
    return [unit for unit in units if _key(unit) not in finished], skipped


def _key(unit: Unit) -> str:
    cell, temperature, prompt = unit
    return unit_key({"prompt": prompt.id, **({"temperature": temperature} if cell is None else {"cell": str(cell)})})


def _work(options: AcceptOptions, models: Models, store: Store, units: list[Unit]) -> None:
    forms = store.forms()
    FORMS.adopt(forms)
    speculators = Speculators(models)
    writer = Cell(options.parsed_settings()[0], "auto", 0.0) if options.parsed_settings() else None
    warm: set[str] = set()
    with _progress() as progress:
        task = progress.add_task("", total=len(units))
        for cell, temperature, prompt in units:
            progress.update(task, description=str(cell or f"log T={temperature:g}"))
            if cell is None:
                assert writer is not None
                kind, entry = "log", log_unit(models, speculators.get(writer), temperature, prompt, options, store)
            else:
                speculator = speculators.get(cell)
                if str(cell.setting) not in warm:  # the first call measures linear layers and fills tables
                    run_unit(models, speculator, cell, prompt, options)
                    warm.add(str(cell.setting))
                kind, entry = "run", run_unit(models, speculator, cell, prompt, options)
            new = {sizes: form for sizes, form in FORMS.names().items() if sizes not in forms}
            if new:  # before the unit that they were measured for: whoever goes on from here multiplies the same way
                store.append("forms", {"linear": new})
                forms |= new
            store.append(kind, entry)
            progress.advance(task)


def _finish(options: AcceptOptions, store: Store, skipped: list[str], done: int) -> int:
    from specdec.experiments.accept.metrics import Runs

    runs = Runs.read(store)
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False, highlight=False)
    show(console, runs)
    for line in skipped:
        console.print(f"not run: {line}")
    if options.report:
        from specdec.experiments.accept.report import write_report

        for path in write_report(store):
            console.print(f"wrote {path}")
    faults = sum(turn["faults"] for run in runs.entries for turn in run["turns"])
    console.print(f"{done} units measured now, {len(runs.entries)} runs in {options.out}")
    if faults:
        console.print(f"the drafter failed {faults} times: those steps decoded plainly")
    return int(faults > 0)


def _progress() -> Progress:
    columns: tuple[Any, ...] = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn(),
                                TimeRemainingColumn())  # fmt: skip
    return Progress(
        *columns, console=Console(stderr=True), refresh_per_second=2, transient=True, disable=not sys.stderr.isatty()
    )
