"""The pair of models an experiment names, and its prompts. Naming it imports no torch, loading it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from specdec.experiments.frame import RunOptions, option
from specdec.experiments.workloads import Prompt, WorkloadError, read_prompts
from specdec.pairing import Pair
from specdec.pairing.chosen import chosen_pair
from specdec.prompt_files import prompt_ids
from specdec.shipped import DEFAULT_PAIR
from specdec.shown_errors import ExperimentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16", "float64")


Dtype = Annotated[str, option("float32, bfloat16, float16 or float64.")]
Device = Annotated[str, option("cpu or cuda.")]
Seed = Annotated[int, option("Seed of prompts and sampling.")]


PROMPT_FILES = "Own prompts: a text, or JSON lines (.jsonl); repeat for more."
Chat = Annotated[bool, option("Ask own prompts in the model's chat template, where it has one.", "--chat/--no-chat")]
NewTokens = Annotated[int, option("Tokens to generate.", "--max-new-tokens", "-n")]


@dataclass(frozen=True, kw_only=True)
class PairOptions(RunOptions):
    """Options of an experiment on a pair. Where `dtype`, `device` or `seed` can be chosen, the fields are declared
    again as `Dtype`, `Device` and `Seed`.

    needs_draft: whether the experiment has nothing to do without a draft model; others take n-grams as well.
    """

    needs_draft: ClassVar[bool] = True
    pair: Annotated[str | Path, option("A pair by name, TOML file, or folder with target/ and draft/.")] = DEFAULT_PAIR
    target: Annotated[str | None, option("Instead of a pair: a model's folder, .gguf file or hub id.")] = None
    draft: Annotated[str | None, option("Draft model for the target, or ngram (default: the pair's; else ngram).")] = (
        None
    )
    gguf_file: Annotated[str | None, option("The target's weights: this file in its folder or repository.")] = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    threads: Annotated[int, option("Torch threads, fixed for the run.")] = 2

    def __post_init__(self) -> None:
        self.at_least(1, "threads")
        self.one_of(DTYPES, "dtype")

    def chosen_pair(self) -> Pair:
        """Raises PairError: see `pairing.chosen.chosen_pair`; ExperimentError: no draft model, which is needed."""
        if self.draft == "none":
            raise ExperimentError("--draft: expected a model or ngram (plain decoding is measured anyway), got none")
        named = None if self.target is not None and self.pair == DEFAULT_PAIR else self.pair
        found = chosen_pair(named, self.target, self.draft, self.gguf_file)
        if self.needs_draft and found.draft.kind != "model":
            raise ExperimentError(f"pair {found.name!r}: expected a pair with a draft model, this has none")
        return found

    @property
    def has_draft_model(self) -> bool:
        """Whether a model drafts; errors as in chosen_pair."""
        return self.chosen_pair().draft.kind == "model"

    def check(self) -> None:
        self.chosen_pair()

    def load(self) -> Models:
        """Raises SpecdecError: see `Models.load`."""
        return Models.load(self.chosen_pair(), self.dtype, self.device)

    def to_dict(self, *left_out: str) -> dict[str, Any]:
        """What was not named is not written down, and of folders the name alone: paths are one machine's."""
        found = super().to_dict(*left_out)
        for name in ("target", "draft", "gguf_file"):
            if (value := found.pop(name, None)) is not None:
                found[name] = Path(value).name if Path(value).exists() else value
        return found


@dataclass(frozen=True)
class Models:
    """A target, its draft model (None: n-grams draft) and their tokenizer."""

    target: PreTrainedModel
    draft_model: PreTrainedModel | None
    tokenizer: Any

    @property
    def draft(self) -> PreTrainedModel:
        """Raises ExperimentError: there is none."""
        if self.draft_model is None:
            raise ExperimentError("expected a pair with a draft model, this has none; give --draft")
        return self.draft_model

    @staticmethod
    def load(
        pair: str | Path | Pair = DEFAULT_PAIR,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        ends: bool = False,
    ) -> Models:
        """The models of a pair.

        Args:
            ends: whether an end token ends a text. Without, all texts of a run have the same length. (`min_new_tokens`
                would do so too, but with a logits processor that costs each way of generating a different time.)

        Raises:
            PairError: no such pair, or none that runs here; SpecdecError: models that cannot be loaded, or whose
                vocabularies differ.
        """
        import torch
        from transformers import GenerationConfig

        from specdec.pairing.loading import load_pair

        found = pair if isinstance(pair, Pair) else chosen_pair(pair)
        target, draft, tokenizer = load_pair(found, getattr(torch, dtype), device)
        models = Models(target, None if isinstance(draft, str) else draft, tokenizer)
        for model in (target, models.draft_model) if not ends else ():
            if model is not None:
                model.generation_config = GenerationConfig(pad_token_id=0)
        return models

    def prompts(self, num: int, length: int, seed: int = 0, rows: int = 1) -> list[Tensor]:
        """`num` held-out prompts of `length` tokens, `rows` of them in a call: int64 `[rows, length]` each."""
        import torch

        from specdec.experiments.corpus import held_out_prompts

        found = held_out_prompts(self.tokenizer, num, length, seed=seed)
        return list(torch.tensor(found, device=self.target.device).split(rows))

    def turn_ids(self, prompt: Prompt, answers: Sequence[str], new_tokens: int, most: int | None = None) -> list[int]:
        """The ids that turn `len(answers)` of a prompt starts from, cut on the left to `most` and to what fits."""
        ids = prompt_ids(self.tokenizer, prompt, answers)
        context = int(getattr(self.target.config.get_text_config(), "max_position_embeddings", 1 << 20))
        room = context - new_tokens if most is None else min(most, context - new_tokens)
        if room < 1:
            raise ExperimentError(f"new_tokens={new_tokens} leaves no room in a context of {context} tokens")
        return ids[-room:]


def own_prompts(files: Sequence[Path], chat: bool) -> list[Prompt]:
    """The prompts of a user's files. chat: see Prompt.

    Raises:
        WorkloadError: see `read_prompts`; two files of one name, under which their results would be filed.
    """
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise WorkloadError(f"--prompt-file: expected files of different names, got {', '.join(names)}")
    return [prompt for file in files for prompt in read_prompts(file, chat)]
