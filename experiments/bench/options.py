"""What a benchmark run can be told. No torch here: `--help` and option errors must be instant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from specdec.experiments.frame import option
from specdec.experiments.pair import PROMPT_FILES, Device, Dtype, Models, NewTokens, PairOptions, Seed, own_prompts
from specdec.shown_errors import ExperimentError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BenchOptions(PairOptions):
    """One benchmark run. `batch` prompts share a call; end tokens do not stop a text; plain generation, the reference,
    always runs. Prompts of `prompt_files` are as long as they are, and take the place of the held-out ones."""

    needs_draft: ClassVar[bool] = False
    prompt_files: Annotated[tuple[Path, ...], option(PROMPT_FILES, "--prompt-file")] = ()
    num_prompts: Annotated[int, option("Held-out prompts.")] = 8
    prompt_tokens: Annotated[int, option("Tokens of each prompt.")] = 128
    new_tokens: NewTokens = 128
    temperature: Annotated[float, option("0 is greedy; outputs are then compared.", "--temperature", "-t")] = 0.0
    batch: Annotated[int, option("Prompts per call.")] = 1
    peers: Annotated[tuple[str, ...], option("Peer or family to run; repeat for more.")] = ()
    rounds: Annotated[int, option("Times every peer sees every prompt.")] = 3
    out: Annotated[Path, option("Folder for the JSONL file and the plot.")] = Path("bench-results")
    dtype: Dtype = "float32"
    device: Device = "cpu"
    seed: Seed = 0
    memory: Annotated[bool, option("Measure peak memory, one process per peer.")] = True
    json: Annotated[bool, option("Print the summary as JSON.", "--json")] = False
    quick: Annotated[bool, option("A short check that everything runs.", "--quick")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_prompts", "prompt_tokens", "batch", "rounds")
        self.at_least(2, "new_tokens")  # one token leaves nothing to speculate on
        self.at_least(0, "temperature")
        if self.prompt_files and self.batch > 1:
            raise ExperimentError("prompts of files have lengths of their own: expected batch 1 with --prompt-file")
        if self.num_prompts % self.batch:
            raise ExperimentError(
                f"expected num_prompts to be a multiple of batch, got {self.num_prompts} and {self.batch}; "
                f"use num_prompts={-(-self.num_prompts // self.batch) * self.batch}"
            )

    def check(self) -> None:
        super().check()
        own_prompts(self.prompt_files)

    def prompts(self, models: Models) -> list[Tensor]:
        """What to generate from, one tensor per call."""
        if self.prompt_files:
            return models.own_prompts(own_prompts(self.prompt_files)[: 2 if self.quick else None], self.new_tokens)
        return models.prompts(self.num_prompts, self.prompt_tokens, self.seed, self.batch)

    def of(self, prompts: Sequence[Tensor]) -> BenchOptions:
        """The options with the number and the greatest length of the prompts that were found."""
        longest = max(ids.shape[1] for ids in prompts)
        return replace(self, num_prompts=sum(len(ids) for ids in prompts), prompt_tokens=longest)

    def to_dict(self, *left_out: str) -> dict[str, Any]:
        found = super().to_dict("prompt_files", *left_out)
        return found | ({"prompt_files": [file.name for file in self.prompt_files]} if self.prompt_files else {})

    @property
    def mode(self) -> str:
        return f"temperature {self.temperature:g}" if self.temperature else "greedy"

    def effective(self) -> BenchOptions:
        """The options with `quick` worked in: does it work, not how fast is it."""
        if not self.quick:
            return self
        return replace(
            self, num_prompts=min(self.num_prompts, 2 * self.batch), new_tokens=min(self.new_tokens, 32), rounds=1,
            memory=False,
        )  # fmt: skip
