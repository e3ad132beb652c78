"""What an acceptance run can be told. No torch here: `--help` and option errors must be instant."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specdec.experiments.accept.setting import Setting
from specdec.experiments.errors import ExperimentError
from specdec.experiments.workloads import Source
from specdec.pairing import Pair
from specdec.pairing.runnable import two_models

DEFAULT_SETTINGS = (
    "model:k=2",
    "model:k=4",
    "model:k=6",
    "model:tree=2,1,1,1,1,1:children=mixed",
    "model:tree=2,1,1,1,1,1:children=sampled",
    "ngram:k=6",
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
PLAIN = Setting("none")
UNRECORDED = ("out", "threads", "device", "report")
"""Options that may differ when a run is resumed: they change how fast it is, not what it measures."""


@dataclass(frozen=True)
class AcceptOptions:
    """One acceptance experiment.

    out: its folder; a run that was interrupted there is resumed. pair: its name, TOML file or folder. settings: see
    Setting. rules: of each setting, by name; empty: up to `max_rules` that take its drafts. temperatures: 0 is greedy.
    prompts: see workloads.Source. num_prompts: of each source. new_tokens: at most, per turn. prompt_tokens: longer
    prompts lose their beginning. top_k, top_p: of the caller's law (0 and 1: none).
    log: also keep p/q summaries of one text per prompt and temperature, for `specdec accept score`.
    """

    out: Path = Path("accept-results")
    pair: str | Path = "stdlib-python"
    settings: tuple[str, ...] = DEFAULT_SETTINGS
    rules: tuple[str, ...] = ()
    max_rules: int = 3
    temperatures: tuple[float, ...] = (0.6, 1.0, 1.5)
    prompts: tuple[str, ...] = ("shipped", "stdlib")
    num_prompts: int = 4
    prompt_tokens: int = 512
    new_tokens: int = 48
    top_k: int = 0
    top_p: float = 1.0
    ignore_eos: bool = True
    log: bool = True
    report: bool = True
    seed: int = 0
    threads: int = 2
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_rules", "num_prompts", "prompt_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ExperimentError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.new_tokens < 2:
            raise ExperimentError(f"new_tokens: expected at least 2, got {self.new_tokens}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ExperimentError(f"temperatures: expected some, all >= 0, got {self.temperatures}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ExperimentError(
                f"expected top_k >= 0 and 0 < top_p <= 1 (0 and 1 cut nothing), got {self.top_k} and {self.top_p}"
            )
        if self.dtype not in DTYPES:
            raise ExperimentError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.settings or not self.prompts:
            raise ExperimentError("expected at least one setting and one source of prompts")
        self.parsed_settings()
        self.sources()
        unknown = set(self.rules) - KNOWN_RULES
        if unknown:
            raise ExperimentError(
                f"rules: expected some of {', '.join(sorted(KNOWN_RULES))}, got {', '.join(sorted(unknown))}"
            )

    def parsed_settings(self) -> list[Setting]:
        """All settings, each once, without plain decoding (which always runs)."""
        found = dict.fromkeys(Setting.parse(text) for text in self.settings)
        return [setting for setting in found if setting != PLAIN]

    def sources(self) -> list[Source]:
        return [Source.parse(text) for text in dict.fromkeys(self.prompts)]

    def chosen_pair(self) -> Pair:
        """Raises PairError: no such pair, or none with two models that run here."""
        return two_models(self.pair)

    def sampling(self, temperature: float) -> dict[str, Any]:
        """The arguments of `generate` that decide the law."""
        if temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "top_k": self.top_k, "top_p": self.top_p}

    def to_dict(self) -> dict[str, Any]:
        out = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        return {**out, "pair": Path(self.pair).name}

    def recorded(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.to_dict().items()
            if name not in UNRECORDED
        }


KNOWN_RULES = frozenset({"rejection", "block", "naive", "recursive_rejection", "traversal", "budget_flow", "coupled"})
