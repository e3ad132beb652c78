"""The options that commands share: their command-line form, and the frozen values they become. Imports no torch."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.pairing import Pair, PairError, find_pair
from specdec.pairing.runnable import refusal
from specdec.pairing.schema import DTYPES, MOST_NODES, MOST_THREADS, RULES, home_expanded, nodes_of_widths
from specdec.pairing.tables import shown
from specdec.shipped import DEFAULT_PAIR

_DIGITS = 10
"""A number of tokens with more digits than that is none."""
_MODELS, _DRAFTS, _TEXT, _MACHINE = "Models", "Drafting", "Decoding", "Machine"


def _option(*names: str, panel: str, help: str, **fields: Any) -> Any:
    return typer.Option(
        *names, help=help, rich_help_panel=panel, show_default=fields.pop("show_default", False), **fields
    )


Target = Annotated[
    str | None, _option("--target", panel=_MODELS, metavar="PATH|ID", help="Target model: folder or hub id.")
]
Draft = Annotated[
    str | None,
    _option(
        "--draft",
        panel=_MODELS,
        metavar="PATH|ID|ngram|none",
        help="Drafter: a model with the same tokenizer, prompt lookup, or plain decoding (default: the pair's; with "
        "--target: ngram).",
    ),
]
PairName = Annotated[
    str | None,
    _option(
        "--pair",
        panel=_MODELS,
        metavar="NAME|PATH",
        help="A pair by name (`specdec pairs list`), its TOML file, or a folder with target/ and draft/ (default: "
        f"{DEFAULT_PAIR}).",
    ),
]
ChainLength = Annotated[
    str | None,
    _option(
        "--k",
        "-k",
        panel=_DRAFTS,
        metavar="N|auto",
        help="Tokens drafted per step, as a chain; auto: planned at every step (default: the pair's own, mostly auto).",
    ),
]
TreeWidths = Annotated[
    str | None,
    _option("--tree", panel=_DRAFTS, metavar="W,W,...", help="Instead of --k: children per level, e.g. 4,2,1."),
]
Rule = Annotated[
    str,
    _option(
        "--rule",
        panel=_DRAFTS,
        metavar="NAME",
        show_default=True,
        help=f"Acceptance rule: {', '.join(RULES)}. auto picks the best exact one; with coupled, sampled text depends "
        "on target and seed alone; typical is lossy.",
    ),
]
Lossy = Annotated[
    bool, _option("--lossy", panel=_DRAFTS, help="Agree that --rule typical changes the law of the text.")
]
MaxNewTokens = Annotated[
    int, _option("--max-new-tokens", "-n", panel=_TEXT, min=1, show_default=True, help="Tokens to generate at most.")
]
Temperature = Annotated[
    float, _option("--temperature", "-t", panel=_TEXT, min=0.0, show_default=True, help="0 is greedy decoding.")
]
TopK = Annotated[
    int | None,
    _option("--top-k", panel=_TEXT, min=0, help="Sample from the k likeliest tokens (default: the model's)."),
]
TopP = Annotated[
    float | None, _option("--top-p", panel=_TEXT, min=0.0, max=1.0, help="Sample from the likeliest p of the mass.")
]
MinP = Annotated[
    float | None, _option("--min-p", panel=_TEXT, min=0.0, max=1.0, help="Drop tokens below p times the likeliest.")
]
Seed = Annotated[int | None, _option("--seed", panel=_TEXT, min=0, help="Seed of sampling (default: a new one).")]
Stop = Annotated[
    list[str] | None, _option("--stop", panel=_TEXT, metavar="TEXT", help="Stop after this text; repeat for more.")
]
Dtype = Annotated[
    str,
    _option("--dtype", panel=_MACHINE, show_default=True, help="auto: float32 on a CPU, the checkpoint's on a GPU."),
]
Device = Annotated[str, _option("--device", panel=_MACHINE, show_default=True, help="auto, cpu, cuda, cuda:1, ...")]
Threads = Annotated[
    int | None, _option("--threads", panel=_MACHINE, min=1, max=MOST_THREADS, help="CPU threads (default: torch's).")
]


@dataclass(frozen=True)
class ModelChoice:
    """Which models run, how they draft, and where.

    target: folder or hub id. draft: the same, "ngram", or None (plain decoding). k: chain length; None: planned where
    no tree is given. tree: children per level.
    pair: what they were taken from, if its own draft runs. pair_dtype: what dtype "auto" means on an accelerator.
    Revisions are those of the pair's models on the hub.
    """

    target: str
    draft: str | None
    k: int | None
    tree: tuple[int, ...] | None
    rule: str
    dtype: str
    device: str
    threads: int | None
    lossy: bool = False
    pair: Pair | None = None
    pair_dtype: str = "auto"
    target_revision: str | None = None
    draft_revision: str | None = None

    @staticmethod
    def of(
        target: str | None,
        draft: str | None,
        pair: str | None,
        k: int | str | None,
        tree: str | None,
        rule: str,
        dtype: str,
        device: str,
        threads: int | None,
        lossy: bool = False,
    ) -> ModelChoice:
        """From the command line's own values.

        Raises:
            typer.BadParameter: contradictory or malformed options (exit code 2).
        """
        if target is not None and pair is not None:
            raise typer.BadParameter("expected --target or --pair, got both")
        if k is not None and tree is not None:
            raise typer.BadParameter("expected --k or --tree, got both: --tree 1,1,1 is --k 3")
        if rule not in RULES:
            raise typer.BadParameter(f"--rule: expected one of {', '.join(RULES)}, got {rule!r}")
        if dtype not in DTYPES:
            raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        length = parse_length(k)
        found, own_draft = None, draft is None
        if target is None:
            found = _pair(DEFAULT_PAIR if pair is None else pair, own_draft)
            target = found.location(found.target)
            rule = found.drafting.rule if rule == "auto" and own_draft else rule
            if draft is None:
                draft = "ngram" if found.draft.kind == "ngram" else found.location(found.draft)
                if k is None and tree is None:
                    length, tree = found.drafting.k, _tree_text(found)
            else:
                found = replace(found, draft=replace(found.draft, revision=None))
        elif draft is None:
            draft = "ngram"
        if draft == "none" and (k is not None or tree is not None):
            raise typer.BadParameter("--draft none decodes plainly: leave out --k and --tree")
        return ModelChoice(
            target=_existing("--target", target),
            draft=None if draft == "none" else draft if draft == "ngram" else _existing("--draft", draft),
            k=length,
            tree=None if tree is None else parse_tree(tree),
            rule=rule,
            dtype=dtype,
            device=device,
            threads=threads,
            lossy=lossy,
            pair=found if own_draft else None,
            pair_dtype="auto" if found is None else found.dtype,
            target_revision=None if found is None else found.target.revision,
            draft_revision=None if found is None else found.draft.revision,
        )


@dataclass(frozen=True)
class Decoding:
    """How the text is chosen; `arguments()` are those of `generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        given = {"--top-k": self.top_k, "--top-p": self.top_p, "--min-p": self.min_p, "--seed": self.seed}
        useless = [name for name, value in given.items() if value is not None]
        if self.temperature == 0 and useless:
            raise typer.BadParameter(f"{', '.join(useless)}: greedy decoding does not sample; add --temperature 1")
        if self.seed is None and self.temperature > 0:
            object.__setattr__(self, "seed", secrets.randbits(32))

    def arguments(self, turn: int = 0) -> dict[str, Any]:
        """Keyword arguments of `Speculator.generate`; what was not given is left to the model's own settings.

        Each turn of a conversation samples with noise of its own.
        """
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.seed is not None:
            chosen = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
            arguments |= {name: value for name, value in chosen.items() if value is not None}
            arguments["seed"] = self.seed + turn
        if self.stop:
            arguments["stop_strings"] = list(self.stop)
        return arguments


def parse_length(text: int | str | None) -> int | None:
    """ "4" -> 4; "auto" -> None, which is how a Speculator is told to plan."""
    if text is None or text == "auto":
        return None
    length = int(text) if str(text).isdecimal() and len(str(text)) < _DIGITS else 0
    if not 1 <= length <= MOST_NODES:
        raise typer.BadParameter(
            f"--k: expected a number of tokens, at least 1, or auto, got {shown(text)}; at most {MOST_NODES}"
        )
    return length


def parse_tree(text: str) -> tuple[int, ...]:
    """ "4,2,1" -> (4, 2, 1)."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise typer.BadParameter(
            f"--tree: expected children per level such as 4,2,1, each at least 1, got {shown(text)}"
        )
    if nodes_of_widths(widths) > MOST_NODES:
        raise typer.BadParameter(f"--tree: expected at most {MOST_NODES} nodes in all, got more: {shown(text)}")
    return widths


def _pair(pair: str, own_draft: bool) -> Pair:
    """The pair named on the command line; one whose draft is not run here will do for another --draft."""
    try:
        found = find_pair(pair)
    except PairError as error:
        raise typer.BadParameter(str(error)) from None
    why = refusal(found) if own_draft else None
    if why is not None:
        raise typer.BadParameter(why)
    return found


def _tree_text(pair: Pair) -> str | None:
    return None if pair.drafting.tree is None else ",".join(map(str, pair.drafting.tree))


def _existing(option: str, name: str) -> str:
    """A folder that exists, or something that can be a hub id (`owner/name`)."""
    folder = home_expanded(Path(name))
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "~", "/")) or name.count("/") > 1 or folder.exists():
        raise typer.BadParameter(f"{option}: expected a folder with a saved model or a hub id, got {name!r}")
    return name
