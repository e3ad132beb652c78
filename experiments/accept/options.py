"""What an acceptance run can be told. No torch here: `--help` and option errors must be instant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from specdec.experiments.accept.setting import EXAMPLES, PLAIN, Setting
from specdec.experiments.display import lacking
from specdec.experiments.frame import Options, argument, option
from specdec.experiments.pair import PROMPT_FILES, Chat, Dtype, NewTokens, PairOptions, Seed, own_prompts
from specdec.experiments.workloads import SOURCES, Source, chosen_sources
from specdec.shown_errors import ExperimentError

DEFAULT_SETTINGS = (
    "model:k=2",
    "model:k=4",
    "model:k=6",
    "model:tree=2,1,1,1,1,1:children=mixed",
    "model:tree=2,1,1,1,1,1:children=sampled",
    "ngram:k=6",
)
"""Of pairs with a draft model."""
NGRAM_SETTINGS = ("ngram:k=3", "ngram:k=6", "ngram:k=10", "ngram:k=10:branches=2")
"""Of other pairs."""
KNOWN_RULES = ("rejection", "block", "naive", "recursive_rejection", "traversal", "budget_flow", "coupled")
SETTING = ("--setting", "-s")
UNRECORDED = ("out", "threads", "device", "report")
"""Options that may differ when a run is resumed: they change how fast it is, not what it measures."""


@dataclass(frozen=True, kw_only=True)
class AcceptOptions(PairOptions):
    """One acceptance experiment."""

    needs_draft: ClassVar[bool] = False
    out: Annotated[Path, option("Folder of the run; an interrupted one is resumed.")] = Path("accept-results")
    settings: Annotated[
        tuple[str, ...], option(f"What drafts (default: some of what the pair has); repeat. {EXAMPLES}", *SETTING)
    ] = ()
    k: Annotated[tuple[int, ...], option("Chains of that length, as by --setting model:k=N; repeat.", "--k", "-k")] = ()
    rules: Annotated[tuple[str, ...], option("Rules to compare (default: the best few per setting).", "--rule")] = ()
    max_rules: Annotated[int, option("Rules per setting when none are named.")] = 3
    temperatures: Annotated[
        tuple[float, ...], option("0 is greedy; repeat.", "--temperature", "-t")
    ] = (0.6, 1.0, 1.5)  # fmt: skip
    prompts: Annotated[tuple[str, ...], option(f"Some of {', '.join(SOURCES)}; repeat.")] = ("shipped", "stdlib")
    num_prompts: Annotated[int, option("Prompts of each source.")] = 4
    prompt_tokens: Annotated[int, option("Longer prompts lose their beginning.")] = 512
    prompt_files: Annotated[tuple[Path, ...], option(f"{PROMPT_FILES} In place of --prompts.", "--prompt-file")] = ()
    chat: Chat = True
    new_tokens: NewTokens = 48
    top_k: Annotated[int, option("Of the sampling law; 0 cuts nothing.")] = 0
    top_p: Annotated[float, option("Of the sampling law; 1 cuts nothing.")] = 1.0
    ignore_eos: Annotated[bool, option("Generate on after an end token (texts of one length).")] = True
    log: Annotated[bool, option("Keep p/q summaries of a text per prompt, for `accept score`.")] = True
    report: Annotated[bool, option("Write report.html and report.png.")] = True
    dtype: Dtype = "float32"
    device: Annotated[str, option("auto, cpu or cuda.")] = "auto"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "max_rules", "num_prompts", "prompt_tokens")
        self.at_least(2, "new_tokens")
        self.one_of(KNOWN_RULES, "rules")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ExperimentError(f"temperatures: expected some, all >= 0, got {self.temperatures}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ExperimentError(
                f"expected top_k >= 0 and 0 < top_p <= 1 (0 and 1 cut nothing), got {self.top_k} and {self.top_p}"
            )
        if not self.prompts:
            raise ExperimentError("expected at least one source of prompts")
        for text in (*self.settings, *(f"model:k={length}" for length in self.k)):
            Setting.parse(text)
        self.sources()

    def check(self) -> None:
        super().check()
        own_prompts(self.prompt_files, self.chat)
        if self.report:
            need_for_report("; or leave it out with --no-report")
        if not self.has_draft_model and (needing := [str(one) for one in self.parsed_settings() if one.needs_model]):
            raise ExperimentError(f"settings {', '.join(needing)}: need a draft model; give --draft")

    def parsed_settings(self) -> list[Setting]:
        """All settings, each once, without plain decoding (which always runs)."""
        drafter, usual = ("model", DEFAULT_SETTINGS) if self.has_draft_model else ("ngram", NGRAM_SETTINGS)
        asked = (*self.settings, *(f"{drafter}:k={length}" for length in self.k))
        found = dict.fromkeys(Setting.parse(text) for text in asked or usual)
        return [setting for setting in found if setting != PLAIN]

    def sources(self) -> list[Source]:
        return chosen_sources(self.prompts, self.prompt_files, self.chat)

    @property
    def has_own_prompts(self) -> bool:
        return any(source.name == "file" for source in self.sources())

    def to_dict(self, *left_out: str) -> dict[str, Any]:
        left_out = (*left_out, "prompt_files", "k", *(() if self.has_own_prompts else ("chat",)))
        found = {**super().to_dict(*left_out), "pair": Path(self.pair).name}
        found["settings"] = tuple(map(str, self.parsed_settings()))
        if self.prompt_files:
            found["prompts"] = tuple(map(str, self.sources()))
        return found

    def recorded(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        found = self.to_dict(*UNRECORDED)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Options):
    """What is scored on the logged texts of a run."""

    folder: Annotated[Path, argument("Folder of a run made with --log.")]
    settings: Annotated[tuple[str, ...], option("What to score; repeat.", *SETTING)] = ()
    rules: Annotated[tuple[str, ...], option("Rules to score (default: all that take the drafts).", "--rule")] = ()
    json: Annotated[Path | None, option("Also write the scores as JSON.")] = None


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Which report is written again."""

    folder: Annotated[Path, argument("Folder of a run.")]
    out: Annotated[Path | None, option("Where to write (default: report.html in the folder).")] = None

    def check(self) -> None:
        need_for_report()


def need_for_report(otherwise: str = "") -> None:
    """Raises ExperimentError: what the report is made with is not installed. Said before a run, not after it."""
    if missing := lacking("matplotlib", "jinja2"):
        raise ExperimentError(f"the report needs {' and '.join(missing)}: pip install 'specdec-lm[viz]'{otherwise}")
