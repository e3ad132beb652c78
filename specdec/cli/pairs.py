"""`specdec pairs`: the shipped pairs, your own, their exports and estimates. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.pairing import Pair, PairError, find_pair, pair_names
from specdec.pairing.checks import problems
from specdec.pairing.devices import DEVICES, LAUNCHES
from specdec.pairing.export import ENGINES, export_pair
from specdec.pairing.registry import pair_table, pair_text, read_pair
from specdec.pairing.roofline import Setting, estimate
from specdec.pairing.schema import DTYPES, RULES, Drafting
from specdec.pairing.tables import one_line

pairs = typer.Typer(
    help="Draft/target pairs: list, show, check and write them; export them to other engines; estimate what they give.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="PAIR", help="A shipped pair's name, a TOML file, or a folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@pairs.command("list")
def list_pairs(as_json: AsJson = False) -> None:
    """All shipped pairs, one line each."""
    found = [find_pair(name) for name in pair_names()]
    if as_json:
        typer.echo(json.dumps([pair_table(pair) for pair in found], indent=2))
        return
    width = max(len(pair.name) for pair in found)
    typer.echo(f"{'pair':<{width}}  {'draft':<6}  {'parameters':>13}  summary")
    for pair in found:
        typer.echo(f"{pair.name:<{width}}  {pair.draft.kind:<6}  {_sizes(pair):>13}  {one_line(pair.summary)}")


@pairs.command()
def show(pair: Name, as_json: AsJson = False) -> None:
    """One pair: its file, and what follows from its facts."""
    found = _find(pair)
    if as_json:
        typer.echo(json.dumps({**pair_table(found), "derived": _derived(found)}, indent=2))
        return
    typer.echo(pair_text(found).rstrip())
    typer.echo("\n# derived from the facts above (16-bit K/V)")
    for line in _derived_lines(found):
        typer.echo(f"# {line}")


@pairs.command()
def validate(
    pair: Annotated[
        list[str] | None, typer.Argument(metavar="PAIR", help="Names or files (default: all shipped).")
    ] = None,
) -> None:
    """Check pairs without loading a model. Exit code 1: something is wrong."""
    names = pair or pair_names()
    failed = 0
    for name in names:
        try:
            wrong = problems(read_pair(name))
        except PairError as error:
            wrong = [str(error)]
        failed += bool(wrong)
        for problem in wrong:
            typer.echo(one_line(f"wrong  {name}: {problem}"))
        if not wrong:
            typer.echo(f"ok     {name}")
    if failed:
        typer.echo(f"{failed} of {len(names)} pairs are not sound", err=True)
        raise typer.Exit(1)


@pairs.command()
def new(
    target: Annotated[str, typer.Option("--target", metavar="PATH|ID", help="Folder or hub id.")],
    draft: Annotated[str, typer.Option("--draft", metavar="PATH|ID|ngram", help="Folder, hub id, or ngram.")],
    name: Annotated[str | None, typer.Option("--name", help="Default: made of both models' names.")] = None,
    k: Annotated[
        str | None, typer.Option("--k", "-k", metavar="N|auto", help="Fixed chain length (default: auto, chosen live).")
    ] = None,
    tree: Annotated[str | None, typer.Option("--tree", metavar="W,W,...", help="Fixed children per level.")] = None,
    rule: Annotated[str, typer.Option("--rule", help=f"One of {', '.join(RULES)}.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    revision: Annotated[str | None, typer.Option("--revision", help="Of the target on the hub.")] = None,
    draft_revision: Annotated[str | None, typer.Option("--draft-revision", help="Of the draft on the hub.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write (default: standard output).")] = None,
) -> None:
    """Write a pair's file, with the facts that lie on this machine. Never asks the hub, never overwrites."""
    from specdec.cli.values import parse_length, parse_tree
    from specdec.pairing.create import new_pair

    if out is not None and out.exists():
        raise typer.BadParameter(f"--out: {str(out)!r} exists; remove it or choose another name")
    drafting = Drafting(k=parse_length(k), tree=None if tree is None else parse_tree(tree), rule=rule)
    try:
        pair = new_pair(
            target, draft, name, drafting=drafting, dtype=dtype, revision=revision, draft_revision=draft_revision,
            folder=None if out is None else out.parent,
        )  # fmt: skip
    except PairError as error:
        raise typer.BadParameter(str(error)) from None
    if out is None:
        typer.echo(pair_text(pair), nl=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(pair_text(pair), encoding="utf-8")
        typer.echo(f"wrote {out}", err=True)
    for role, part in (("target", pair.target), ("draft", pair.draft)):
        if part.facts is None and (role == "target" or pair.draft.word is None):
            typer.echo(f"note: no facts about the {role}: it is not on this machine; estimates need them", err=True)


@pairs.command()
def export(
    pair: Name,
    to: Annotated[str, typer.Option("--to", metavar="ENGINE", help=f"One of {', '.join(ENGINES)}.")],
    as_json: AsJson = False,
) -> None:
    """The arguments another engine takes for the same pair; what does not carry over is said in comments."""
    try:
        exported = export_pair(find_pair(pair), to)
    except PairError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(json.dumps(exported.to_dict(), indent=2) if as_json else exported.text())


@pairs.command("estimate")
def show_estimate(
    pair: Name,
    device: Annotated[str, typer.Option("--device", help=f"One of {', '.join(DEVICES)}; or GB,GB/s,Tflop/s.")] = "h200",
    context: Annotated[int, typer.Option("--context", min=0, help="Tokens in the K/V cache.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows decoded together.")] = 1,
    weight_bits: Annotated[
        float | None, typer.Option("--weight-bits", help="Of both models' weights (default: the pair's dtype).")
    ] = None,
    launch: Annotated[
        str, typer.Option("--launch", help=f"How kernels are launched: {' or '.join(LAUNCHES)}.")
    ] = "graphs",
    num_devices: Annotated[int, typer.Option("--num-devices", min=1, help="Tensor-parallel devices.")] = 1,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", metavar="DIR", help="Also with the acceptance of a `specdec accept` run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Memory, floor per step and speed-up by acceptance, from bytes and operations alone. Not a measurement."""
    from specdec.cli.pairs_measured import measured_gains, measured_lines, measured_table
    from specdec.cli.pairs_text import estimate_table, estimate_text

    try:
        found = find_pair(pair)
        setting = Setting(device, context, batch, weight_bits, launch, num_devices)
        result = estimate(found, setting)
        gains = None if measured is None else measured_gains(measured, found, setting)
    except PairError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        table = estimate_table(found, setting, result)
        typer.echo(json.dumps(table | ({} if gains is None else {"measured": measured_table(gains)}), indent=2))
        return
    typer.echo(estimate_text(found, setting, result))
    for line in () if gains is None or measured is None else measured_lines(gains, measured):
        typer.echo(line)


def _find(pair: str) -> Pair:
    try:
        return find_pair(pair)
    except PairError as error:
        raise typer.BadParameter(str(error)) from None


def _sizes(pair: Pair) -> str:
    """Parameters of target and draft, e.g. "8.0B + 425M"."""
    known = [part.facts.num_parameters for part in (pair.target, pair.draft) if part.facts is not None]
    return " + ".join(f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M" for count in known)


def _derived(pair: Pair) -> dict[str, Any]:
    """What follows from the facts, per role that has them."""
    found: dict[str, Any] = {}
    for role, facts in (("target", pair.target.facts), ("draft", pair.draft.facts)):
        if facts is not None:
            found[role] = {
                "step_parameters": facts.step_parameters,
                "kv_bytes_per_token": 2 * facts.kv_values_per_token,
                "weight_gb_16_bit": round(2 * facts.num_parameters / 1e9, 3),
            }
    return found


def _derived_lines(pair: Pair) -> list[str]:
    lines = []
    for role, derived in _derived(pair).items():
        lines.append(
            f"{role}: {derived['weight_gb_16_bit']:g} GB of weights in 16 bit, {derived['step_parameters']:,} read per "
            f"decode pass, {derived['kv_bytes_per_token']:,} bytes of K/V per token"
        )
    return lines or ["nothing: the pair states no facts"]
