"""What a benchmark run can be told. No torch here: `--help` and option errors must be instant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from specdec.experiments.frame import option
from specdec.experiments.pair import (
    PROMPT_FILES,
    Chat,
    Device,
    Dtype,
    Models,
    NewTokens,
    PairOptions,
    Seed,
    own_prompts,
)
from specdec.experiments.workloads import SOURCES, Source, chosen_sources
from specdec.shown_errors import ExperimentError

if TYPE_CHECKING:
    from torch import Tensor


class Asked(NamedTuple):
    """What one call generates from. ids: int64 `[batch, tokens]`. domain: results are grouped by it, too."""

    ids: Tensor
    name: str
    domain: str


@dataclass(frozen=True, kw_only=True)
class BenchOptions(PairOptions):
    """One benchmark run. `batch` prompts share a call; end tokens do not stop a text; plain generation, the reference,
    always runs. Prompts of `sources` and `prompt_files` are as long as they are, and take the place of the held-out
    ones."""

    needs_draft: ClassVar[bool] = False
    sources: Annotated[
        tuple[str, ...], option(f"Instead of held-out prompts: some of {', '.join(SOURCES)}; repeat.", "--prompts")
    ] = ()
    prompt_files: Annotated[tuple[Path, ...], option(f"{PROMPT_FILES} In place of --prompts.", "--prompt-file")] = ()
    chat: Chat = True
    k: Annotated[
        tuple[int, ...], option("Lengths of drafts (default: several for each way); repeat.", "--k", "-k")
    ] = ()
    num_prompts: Annotated[int, option("Held-out prompts, or prompts of each source.")] = 8
    prompt_tokens: Annotated[int, option("Tokens of each held-out prompt.")] = 128
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
        if self.k and min(self.k) < 1:
            raise ExperimentError(f"k: expected lengths of drafts, at least 1 each, got {', '.join(map(str, self.k))}")
        self.at_least(2, "new_tokens")  # one token leaves nothing to speculate on
        self.at_least(0, "temperature")
        if (self.prompt_files or self.sources) and self.batch > 1:
            option = "--prompt-file" if self.prompt_files else "--prompts"
            raise ExperimentError(f"these prompts have lengths of their own: expected batch 1 with {option}")
        for text in self.sources:
            Source.parse(text)
        if self.num_prompts % self.batch:
            raise ExperimentError(
                f"expected num_prompts to be a multiple of batch, got {self.num_prompts} and {self.batch}; "
                f"use num_prompts={-(-self.num_prompts // self.batch) * self.batch}"
            )

    def check(self) -> None:
        super().check()
        own_prompts(self.prompt_files, self.chat)

    def prompts(self, models: Models) -> list[Asked]:
        """What to generate from, one entry per call; of other prompts than the held-out ones the first turns."""
        import torch

        if not (self.prompt_files or self.sources):
            held_out = models.prompts(self.num_prompts, self.prompt_tokens, self.seed, self.batch)
            return [Asked(ids, f"stdlib-{self.seed}-{i}", "stdlib") for i, ids in enumerate(held_out)]
        if self.prompt_files:
            found = own_prompts(self.prompt_files, self.chat)[: 2 if self.quick else None]
        else:
            found = [
                one for source in self._chosen() for one in source.load(models.tokenizer, self.num_prompts, self.seed)
            ]
        device = models.target.device
        ids = [torch.tensor([models.turn_ids(prompt, [], self.new_tokens)], device=device) for prompt in found]
        return [Asked(one, prompt.id, prompt.domain) for one, prompt in zip(ids, found, strict=True)]

    def of(self, prompts: Sequence[Asked]) -> BenchOptions:
        """The options with the number and the greatest length of the prompts that were found."""
        longest = max(one.ids.shape[1] for one in prompts)
        return replace(self, num_prompts=sum(len(one.ids) for one in prompts), prompt_tokens=longest)

    def to_dict(self, *left_out: str) -> dict[str, Any]:
        found = super().to_dict("prompt_files", "sources", "chat", "k", *left_out)
        if self.k:
            found["k"] = self.k
        if self.has_own_prompts:
            found["chat"] = self.chat
        if self.prompt_files:
            return found | {"prompt_files": [file.name for file in self.prompt_files]}
        return found | ({"prompts": [str(Source.parse(text)) for text in self.sources]} if self.sources else {})

    @property
    def has_own_prompts(self) -> bool:
        return any(source.name == "file" for source in self._chosen())

    def _chosen(self) -> list[Source]:
        """None where prompts are held out of the library's own."""
        return chosen_sources(self.sources, self.prompt_files, self.chat)

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
