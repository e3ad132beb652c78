"""One experiment from options to exit code: what is left to do is done, by as many processes as were launched."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from specdec.experiments.accept.logbook import log_unit
from specdec.experiments.accept.measure import run_unit
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.setting import PLAIN, Cell, Setting
from specdec.experiments.accept.show import show
from specdec.experiments.accept.store import Store, unit_key
from specdec.experiments.display import console, tracked
from specdec.experiments.frame import started
from specdec.experiments.pair import Models
from specdec.experiments.workloads import Prompt
from specdec.prompt_files import how_asked
from specdec.speculator import Speculator
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
    share = Share.of(options.device)
    store = Store(options.out, share.rank)
    if share.rank == 0:
        store.open(options.recorded())
    share.wait()
    if share.rank:
        store.open(options.recorded())
    source = started(
        options, options.seed, str(share.device), pair=options.chosen_pair().name, options=options.to_dict(),
        rank=share.rank, num_processes=share.count,
    )  # fmt: skip
    models = Models.load(options.chosen_pair(), options.dtype, share.device, ends=not options.ignore_eos)
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
    asked = [how_asked(models.tokenizer, options.chat)] if options.has_own_prompts else []
    return _finish(options, store, [*(f"not run: {line}" for line in skipped), *asked], len(todo))


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
            if options.log and options.has_draft_model:  # a log sets two models' laws side by side
                units.append((None, temperature, prompt))
            units += [(cell, temperature, prompt) for cell in wanted if cell.temperature == temperature]
    return [unit for unit in units if _key(unit) not in finished], skipped


def cells(options: AcceptOptions) -> tuple[list[Cell], list[str]]:
    """The cells to run, plain decoding of each temperature first, and which combinations are left out and why."""
    found: list[Cell] = []
    skipped: list[str] = []
    for temperature in dict.fromkeys(options.temperatures):
        found.append(Cell(PLAIN, PLAIN.rules(temperature)[0], temperature))
        for setting in options.parsed_settings():
            takes = setting.rules(temperature)
            rules = takes[: options.max_rules] if temperature == 0 or not options.rules else options.rules
            for rule in rules:
                if rule in takes:
                    found.append(Cell(setting, rule, temperature))
                elif temperature == max(options.temperatures):
                    shape, nodes = setting.shape_kind
                    skipped.append(f"{setting} with {rule}: it drafts {nodes} {shape}s; such drafts take "
                                   f"{', '.join(takes)}")  # fmt: skip
    return found, skipped


def _key(unit: Unit) -> str:
    cell, temperature, prompt = unit
    return unit_key({"prompt": prompt.id, **({"temperature": temperature} if cell is None else {"cell": str(cell)})})


def _work(options: AcceptOptions, models: Models, store: Store, units: list[Unit]) -> None:
    forms = store.forms()
    FORMS.adopt(forms)

    @cache
    def speculator(setting: Setting, rule: str) -> Speculator:
        return Speculator(models.target, setting.build(models.draft_model, models.target), rule=rule)

    writer = Cell(options.parsed_settings()[0], "auto", 0.0) if options.parsed_settings() else None
    warm: set[str] = set()
    for cell, temperature, prompt in tracked(units, "", lambda unit: str(unit[0] or f"log T={unit[1]:g}")):
        if cell is None:
            assert writer is not None
            kind, entry = (
                "log",
                log_unit(models, speculator(writer.setting, writer.rule), temperature, prompt, options, store),
            )
        else:
            own = speculator(cell.setting, cell.rule)
            if str(cell.setting) not in warm:  # the first call measures linear layers and fills tables
                run_unit(models, own, cell, prompt, options)
                warm.add(str(cell.setting))
            kind, entry = "run", run_unit(models, own, cell, prompt, options)
        new = {sizes: form for sizes, form in FORMS.names().items() if sizes not in forms}
        if new:  # before the unit that they were measured for: whoever goes on from here multiplies the same way
            store.append("forms", {"linear": new})
            forms |= new
        store.append(kind, entry)


def _finish(options: AcceptOptions, store: Store, remarks: list[str], done: int) -> int:
    from specdec.experiments.accept.metrics import Runs

    runs = Runs.read(store)
    page = console(180)
    show(page, runs)
    for line in remarks:
        page.print(line)
    if options.report:
        from specdec.experiments.accept.report.page import write_report

        for path in write_report(store):
            page.print(f"wrote {path}")
    faults = sum(turn["faults"] for run in runs.entries for turn in run["turns"])
    page.print(f"{done} units measured now, {len(runs.entries)} runs in {options.out}")
    if faults:
        page.print(f"the drafter failed {faults} times: those steps decoded plainly")
    return int(faults > 0)
