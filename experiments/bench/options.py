"""What a benchmark run can be told. No torch here: `--help` and option errors must be instant."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specdec.pairing import Pair
from specdec.pairing.runnable import two_models

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class BenchOptions:
    """One benchmark run.

    pair: a pair with two models: its name, TOML file, or folder with `target/` and `draft/`.
    num_prompts: held-out prompts; `batch` of them share a call.
    prompt_tokens, new_tokens: length of each prompt, and of what is generated (end tokens do not stop a run).
    temperature: 0 = greedy, where outputs are compared token by token; else sampling from the unfiltered law.
    threads: torch threads, fixed for the whole run.
    peers: names or families to run (empty = all); plain generation always runs, it is the reference.
    rounds: times every peer sees every prompt.
    out: folder for the JSONL file and the plot.
    memory: also measure peak memory, each peer in a process of its own.
    quick: few settings, prompts and tokens, no memory pass: does it work, not how fast is it.
    """

    pair: str | Path = "stdlib-python"
    num_prompts: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 128
    temperature: float = 0.0
    batch: int = 1
    threads: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    peers: tuple[str, ...] = ()
    rounds: int = 3
    seed: int = 0
    out: Path = Path("bench-results")
    memory: bool = True
    json: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("num_prompts", "prompt_tokens", "new_tokens", "batch", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.new_tokens < 2:
            raise ValueError(
                f"expected new_tokens >= 2 (one token leaves nothing to speculate on), got {self.new_tokens}"
            )
        if self.temperature < 0:
            raise ValueError(f"expected temperature >= 0 (0 = greedy), got {self.temperature}")
        if self.dtype not in DTYPES:
            raise ValueError(f"expected dtype to be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.num_prompts % self.batch:
            raise ValueError(
                f"expected num_prompts to be a multiple of batch, got {self.num_prompts} and {self.batch}; "
                f"use num_prompts={-(-self.num_prompts // self.batch) * self.batch}"
            )

    @property
    def sampling(self) -> bool:
        return self.temperature > 0

    def effective(self) -> BenchOptions:
        """The options with `quick` worked in."""
        if not self.quick:
            return self
        return replace(
            self,
            num_prompts=min(self.num_prompts, 2 * self.batch),
            new_tokens=min(self.new_tokens, 32),
            rounds=1,
            memory=False,
        )

    def chosen_pair(self) -> Pair:
        """The pair that `pair` means.

        Raises:
            PairError: no such pair, or none with two models that run here.
        """
        return two_models(self.pair)

    def to_dict(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
