"""`specdec check`: does this pair emit exactly the target's law, on this machine?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from specdec.cli import options as cli
from specdec.cli.values import file_prompts
from specdec.prompt_files import Prompt, how_asked, prompt_ids

BUDGET, QUICK_BUDGET = 90.0, 20.0
"""Seconds, loading included."""
LEAST_SHARE = 0.3
"""Part of the budget that the check itself has in any case, however long loading took."""
QUICK_PROMPTS = 2
_STYLES = {"pass": "green", "weak": "yellow", "FAIL": "bold red", "info": "dim", "skipped": "dim"}


def check(
    target: cli.Target = None,
    draft: cli.Draft = None,
    pair: cli.PairName = None,
    gguf_file: cli.GgufFile = None,
    k: cli.ChainLength = None,
    tree: cli.TreeWidths = None,
    rule: cli.Rule = "auto",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A text to continue; repeat for more (default: four).")
    ] = None,
    prompt_files: cli.PromptFiles = None,
    chat: cli.Chat = True,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="Of the sampled part; greedy text is checked in any case.")
    ] = 1.0,
    top_k: cli.TopK = None,
    top_p: cli.TopP = None,
    min_p: cli.MinP = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of noise and audits.")] = 0,
    budget: Annotated[
        float, typer.Option("--budget", min=1.0, help="Seconds to spend, loading included; more find smaller errors.")
    ] = BUDGET,
    quick: Annotated[bool, typer.Option("--quick", help=f"Spend at most {QUICK_BUDGET:.0f} seconds.")] = False,
    dtype: cli.Dtype = "auto",
    device: cli.Device = "auto",
    threads: cli.Threads = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Also write everything found as JSON (- for stdout).")
    ] = None,
) -> None:
    """Judge greedy text, K/V, sampled laws and acceptance against the plain model. Exit code 1: something is wrong."""
    start = perf_counter()
    choice = cli.ModelChoice.of(target, draft, pair, gguf_file, k, tree, rule, dtype, device, threads)
    if not temperature > 0:
        raise typer.BadParameter(f"--temperature: expected > 0 (greedy text is checked in any case), got {temperature}")

    own = [Prompt(text, "own", (text,), chat=chat) for text in prompt or ()]
    own += [one for path in prompt_files or () for one in file_prompts(path, chat)]

    from specdec.cli.loading import load
    from specdec.lab.prompts import DEFAULT_PROMPTS

    loaded = load(choice)
    asked = [prompt_ids(loaded.tokenizer, one) for one in own]
    sampling = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    spec = loaded.speculator
    seconds = min(budget, QUICK_BUDGET) if quick else budget
    report = _with_progress(
        spec.target,
        None if spec.drafter is None else spec.drafter.inner,
        rule=choice.rule,
        prompts=asked or (DEFAULT_PROMPTS[:QUICK_PROMPTS] if quick else None),
        temperature=temperature,
        budget_s=max(LEAST_SHARE * seconds, seconds - (perf_counter() - start)),
        threads=threads,
        seed=seed,
        tokenizer=loaded.tokenizer,
        **{name: value for name, value in sampling.items() if value is not None},
    )
    if json_path is None or str(json_path) != "-":
        _show(report, how_asked(loaded.tokenizer, chat) if own else None)
    if json_path is not None:
        _write(json_path, report, choice, loaded, seed)
    if not report.passed:
        raise typer.Exit(1)


def _with_progress(*pair: Any, **arguments: Any) -> Any:
    """Run the check under a progress bar on stderr, which is gone when it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from specdec.lab import check as judge

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=1.0)
        return judge(
            *pair, progress=lambda share, what: bar.update(task, completed=share, description=what), **arguments
        )


def _show(report: Any, remark: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from specdec.lab.findings import verdict

    table = Table(title="Exactness check", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("test", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in report.findings:
        style = _STYLES[finding.label]
        table.add_row(Text(finding.label, style), finding.name, Text(finding.detail, "dim" if style == "dim" else ""))
    console = Console()
    console.print(table)
    settings = report.settings
    console.print(
        Text(
            f"{settings['drafter']} drafter, rule {settings['rule']}, {settings['num_prompts']} prompts, "
            f"{settings['num_rows']} continuations, {settings['num_tokens']} tokens, {settings['seconds']:.0f} s; "
            f"an exact pair fails with probability below {settings['alpha']:g}"
        )
    )
    if remark is not None:
        console.print(Text(remark))
    console.print(Text(verdict(report), "green" if report.passed else "bold red"))


def _write(path: Path, report: Any, choice: cli.ModelChoice, loaded: Any, seed: int) -> None:
    import torch

    from specdec.provenance import provenance

    models = {"target": Path(choice.target).name, "draft": None if choice.draft is None else Path(choice.draft).name}
    source = provenance(
        seed=seed, threads=torch.get_num_threads(), device=str(loaded.device), models=models,
        dtype=str(loaded.speculator.target.dtype).removeprefix("torch."),
    )  # fmt: skip
    text = json.dumps({**report.to_dict(), "provenance": source}, indent=2) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.write_text(text)
