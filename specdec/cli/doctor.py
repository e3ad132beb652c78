"""`specdec doctor`: is this installation able to do what the library promises?"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Any, Literal

import typer

import specdec
from specdec.cli import options as cli
from specdec.namesake import DISTRIBUTION, namesake
from specdec.shipped import DEFAULT_PAIR

NUM_PROBE_TOKENS = 16
_PROMPT = "def main(argv=None):\n    "
_OPTIONAL = ("flash-attn", "flash-attn-4", "triton")
"""Found by distribution name: both flash-attention packages install a module called `flash_attn`."""


@dataclass(frozen=True)
class Check:
    """One line of the report: "info" is a fact, "ok" and "failed" are verdicts."""

    name: str
    status: Literal["info", "ok", "failed"]
    detail: str


def doctor(
    pair: Annotated[str, typer.Option("--pair", help="The pair to try.")] = DEFAULT_PAIR,
    device: cli.Device = "auto",
    threads: cli.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions and hardware, and try the shipped pair. Exit code 1 when something is broken."""
    checks = list(run_checks(pair, device, threads))
    healthy = all(check.status != "failed" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.echo(f"{check.status:<6}  {check.name:<{width}}  {check.detail}")
        typer.echo("everything works" if healthy else "something is broken: see the lines marked `failed`")
    if not healthy:
        raise typer.Exit(1)


def run_checks(pair: str, device: str, threads: int | None) -> Iterator[Check]:
    """All checks, the cheap ones first; none of them raises."""
    yield Check("specdec", "info", specdec.__version__)
    yield from (Check("specdec", "failed", line) for line in namesake())
    yield Check("python", "info", f"{platform.python_version()} on {platform.platform()}")
    yield from check_dependencies(metadata.version, _requirements())
    yield from _guarded("tested versions", _tested)
    for name in _OPTIONAL:
        yield Check(name, "info", _version(name) or "not installed (optional)")
    yield from _guarded("hardware", lambda: _hardware(threads))
    yield from _guarded("native passes", _native)
    yield from _guarded("pair", lambda: check_pair(pair, device, threads))


def check_dependencies(version_of: Callable[[str], str], requirements: list[str]) -> Iterator[Check]:
    """Is each requirement (as in package metadata) met by the installed versions?"""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = version_of(requirement.name)
        except metadata.PackageNotFoundError:
            yield Check(requirement.name, "failed", f"not installed, expected {requirement}")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Check(
            requirement.name, "ok" if fits else "failed", version if fits else f"{version}, expected {requirement}"
        )


def check_pair(pair: str, device: str, threads: int | None) -> Iterator[Check]:
    """Load a pair and compare speculative greedy text with plain `generate`'s."""
    from specdec.cli.loading import load
    from specdec.drafters.model import DEFAULT_K
    from specdec.verify.attention.register import attention_of

    # Fixed drafts: a planner that decodes plainly would leave the drafter untried.
    choice = cli.ModelChoice.of(None, None, pair, None, DEFAULT_K, None, "auto", "float32", device, threads)
    loaded = load(choice)
    target: Any = loaded.speculator.target
    with attention_of(target) as used:
        yield Check("attention", "info", f"{used} for {type(target).__name__} on {loaded.device}")
    yield Check("pair", "ok", f"{pair} loads from {choice.target}")
    inputs = loaded.encode(_PROMPT)
    length: dict[str, Any] = {"max_new_tokens": NUM_PROBE_TOKENS, "do_sample": False}
    plain = target.generate(**inputs, **length)[0].tolist()
    ours = loaded.speculator.generate(**inputs, **length)[0].tolist()
    report = loaded.speculator.report
    assert report is not None
    yield compare(plain, ours, f"{NUM_PROBE_TOKENS} greedy tokens in {report.num_steps} steps, equal to plain generate")
    if report.num_drafter_faults:
        yield Check("drafter", "failed", f"{report.num_drafter_faults} faults, last: {report.last_drafter_fault}")


def compare(plain: list[int], ours: list[int], detail: str) -> Check:
    """The verdict on two token sequences that must be equal."""
    if plain == ours:
        return Check("generate", "ok", detail)
    same = next((i for i, pair in enumerate(zip(plain, ours, strict=False)) if pair[0] != pair[1]), None)
    where = min(len(plain), len(ours)) if same is None else same
    return Check(
        "generate",
        "failed",
        f"speculative text leaves plain generate's at token {where}: expected {plain[where : where + 3]}, got "
        f"{ours[where : where + 3]}; on a GPU a tie of two logits can do this, on a CPU it is a bug",
    )


def _hardware(threads: int | None) -> Iterator[Check]:
    import torch

    chosen = threads or torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("cpu", "info", f"{platform.machine()}, {os.cpu_count()} cores, {chosen} threads, {capability}")
    if not torch.cuda.is_available():
        yield Check("gpu", "info", "none that torch can use")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        yield Check(f"gpu {index}", "info", f"{found.name}, {size}, compute capability {found.major}.{found.minor}")


def _native() -> Iterator[Check]:
    from specdec.verify.native.library import why_not

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below
        reason = why_not()
    yield Check("native passes", "info", reason or "compiled for this processor")


def _tested() -> Iterator[Check]:
    from specdec.kv.versions import tested_range

    yield Check("tested versions", "info", tested_range())


def _guarded(name: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that raises is a finding, whatever it raises: finding that out is what this command is for."""
    try:
        yield from checks()
    except Exception as error:
        yield Check(name, "failed", f"{type(error).__name__}: {error}")


def _requirements() -> list[str]:
    """The library's own, from its metadata; empty where it is used without being installed."""
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ["torch", "transformers", "accelerate"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
