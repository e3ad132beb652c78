"""The options that commands share: their command-line form, and the frozen values they become. Imports no torch."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.cli.values import parse_length, parse_tree
from specdec.pairing import Pair, PairError
from specdec.pairing.chosen import chosen_pair
from specdec.pairing.schema import DTYPES, MOST_THREADS, RULES
from specdec.shipped import DEFAULT_PAIR

_MODELS, _DRAFTS, _TEXT, _MACHINE = "Models", "Drafting", "Decoding", "Machine"


def _option(*names: str, panel: str, help: str, **fields: Any) -> Any:
    return typer.Option(
        *names, help=help, rich_help_panel=panel, show_default=fields.pop("show_default", False), **fields
    )


Target = Annotated[
    str | None,
    _option("--target", panel=_MODELS, metavar="PATH|ID", help="Target model: folder, .gguf file or hub id."),
]
GgufFile = Annotated[
    str | None,
    _option(
        "--gguf-file", panel=_MODELS, metavar="NAME", help="The target's weights: this file in its folder or repo."
    ),
]
PromptFile = Annotated[
    Path | None,
    _option(
        "--prompt-file", panel=_TEXT, metavar="FILE", help="A text file; - is standard input. Its text as it stands."
    ),
]
PromptFiles = Annotated[
    list[Path] | None,
    _option(
        "--prompt-file", panel=_TEXT, metavar="FILE", help="A text, or JSON lines of prompts (.jsonl); repeat for more."
    ),
]
Chat = Annotated[
    bool,
    _option(
        "--chat/--no-chat",
        panel=_TEXT,
        show_default=True,
        help="Ask prompts in the model's chat template, if it has one.",
    ),
]
Draft = Annotated[
    str | None,
    _option(
        "--draft",
        panel=_MODELS,
        metavar="PATH|ID|WORD",
        help="Drafter: a model with the same tokenizer, or a word: ngram (prompt lookup), suffix (the same, any "
        "length), self:int8, self:int4, self (the target itself, in few bits), none (default: the pair's; with "
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

    pair: the target and what drafts. drafts: False for plain decoding. own_draft: the draft is the one that a named
    pair comes with. k: chain length; None: planned where no tree is given. tree: children per level.
    """

    pair: Pair
    drafts: bool
    own_draft: bool
    k: int | None
    tree: tuple[int, ...] | None
    rule: str
    dtype: str
    device: str
    threads: int | None
    lossy: bool = False

    @property
    def target(self) -> str:
        """Folder or hub id."""
        return self.pair.location(self.pair.target)

    @property
    def draft(self) -> str | None:
        """Folder, hub id, a word such as "ngram" or "self:int8", or None (plain decoding)."""
        if not self.drafts:
            return None
        return self.pair.draft.word or self.pair.location(self.pair.draft)

    @staticmethod
    def of(
        target: str | None,
        draft: str | None,
        pair: str | None,
        gguf_file: str | None,
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
        if k is not None and tree is not None:
            raise typer.BadParameter("expected --k or --tree, got both: --tree 1,1,1 is --k 3")
        if rule not in RULES:
            raise typer.BadParameter(f"--rule: expected one of {', '.join(RULES)}, got {rule!r}")
        if dtype not in DTYPES:
            raise typer.BadParameter(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        if draft == "none" and (k is not None or tree is not None):
            raise typer.BadParameter("--draft none decodes plainly: leave out --k and --tree")
        try:
            found = chosen_pair(pair, target, "ngram" if draft == "none" else draft, gguf_file)
        except PairError as error:
            raise typer.BadParameter(str(error)) from None
        length, widths = parse_length(k), None if tree is None else parse_tree(tree)
        if k is None and tree is None:
            length, widths = found.drafting.k, found.drafting.tree
        return ModelChoice(
            pair=found,
            drafts=draft != "none",
            own_draft=target is None and draft is None,
            k=length,
            tree=widths,
            rule=found.drafting.rule if rule == "auto" else rule,
            dtype=dtype,
            device=device,
            threads=threads,
            lossy=lossy,
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
