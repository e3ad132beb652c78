"""The pair of models an experiment names, and its prompts. Naming it imports no torch, loading it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from specdec.experiments.frame import RunOptions, option
from specdec.pairing import Pair
from specdec.pairing.runnable import two_models
from specdec.shipped import DEFAULT_PAIR

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16", "float64")


Dtype = Annotated[str, option("float32, bfloat16, float16 or float64.")]
Device = Annotated[str, option("cpu or cuda.")]
Seed = Annotated[int, option("Seed of prompts and sampling.")]


@dataclass(frozen=True, kw_only=True)
class PairOptions(RunOptions):
    """Options of an experiment on a pair with two models. Where `dtype`, `device` or `seed` can be chosen, the fields
    are declared again as `Dtype`, `Device` and `Seed`."""

    pair: Annotated[str | Path, option("A pair by name, TOML file, or folder with target/ and draft/.")] = DEFAULT_PAIR
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    threads: Annotated[int, option("Torch threads, fixed for the run.")] = 2

    def __post_init__(self) -> None:
        self.at_least(1, "threads")
        self.one_of(DTYPES, "dtype")

    def chosen_pair(self) -> Pair:
        """Raises PairError: no such pair, or none with two models that run here."""
        return two_models(self.pair)

    def check(self) -> None:
        self.chosen_pair()

    def load(self) -> Models:
        """Raises SpecdecError: see `Models.load`."""
        return Models.load(self.pair, self.dtype, self.device)


@dataclass(frozen=True)
class Models:
    """A target, its draft model and their tokenizer."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: Any

    @staticmethod
    def load(
        pair: str | Path = DEFAULT_PAIR, dtype: str = "float32", device: torch.device | str = "cpu", ends: bool = False
    ) -> Models:
        """The models of a pair.

        Args:
            ends: whether an end token ends a text. Without, all texts of a run have the same length. (`min_new_tokens`
                would do so too, but with a logits processor that costs each way of generating a different time.)

        Raises:
            PairError: no such pair, or none with two models; SpecdecError: models that cannot be loaded, or whose
                vocabularies differ.
        """
        import torch
        from transformers import GenerationConfig, PreTrainedModel

        from specdec.pairing.loading import load_pair

        target, draft, tokenizer = load_pair(two_models(pair), getattr(torch, dtype), device)
        assert isinstance(draft, PreTrainedModel)
        for model in (target, draft) if not ends else ():
            model.generation_config = GenerationConfig(pad_token_id=0)
        return Models(target, draft, tokenizer)

    def prompts(self, num: int, length: int, seed: int = 0, rows: int = 1) -> list[Tensor]:
        """`num` held-out prompts of `length` tokens, `rows` of them in a call: int64 `[rows, length]` each."""
        import torch

        from specdec.experiments.corpus import held_out_prompts

        found = held_out_prompts(self.tokenizer, num, length, seed=seed)
        return list(torch.tensor(found, device=self.target.device).split(rows))
