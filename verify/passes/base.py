"""What a forward pass is asked for and what it gives (`Part`, `Output`), and whoever can run one (`Runner`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kv.base import PassCache
from specdec.kv.errors import InvalidTreeError
from specdec.kv.quantised import Quantised
from specdec.kv.write import Write
from specdec.verify.tree import DraftTree

PREFILL_CHUNK = 2048
"""Prompt tokens of a row per pass behind others: bounds the memory of its mask."""
FIRST_CHUNK = 4096
"""The same from the beginning of a text, where no mask is needed: bounds the memory of activations."""


class Text(NamedTuple):
    """Plain text to be read: row `b`'s `tokens[b, :valid[b]]` go to slots from `starts[b]` on.

    tokens: int64 `[rows, T]`; valid: None when all columns are real.
    """

    cache: PassCache
    tokens: Tensor
    starts: Sequence[int]
    valid: Sequence[int] | None


class Nodes(NamedTuple):
    """The place of a part's tokens in draft trees, of which the first `first` nodes lie in the tail already.

    lengths: committed slots per row. depths: int64 `[rows, first + T]`. ancestors: bool `[rows, T, first + T]`, self
    included.
    """

    lengths: Sequence[int]
    depths: Tensor
    ancestors: Tensor
    first: int


class Part(NamedTuple):
    """Rows of one width in a pass.

    tokens: int64 `[rows, T]`. write: where their K/V goes, and what is read. nodes: their place in draft trees; None
    for plain text, where token `j` of row `b` is number `write.starts[b] + j` and sees those before it and itself.
    tree: the trees whose nodes these are, all of them, chains too. keep: logits of so many last columns, 0 for all,
    None for none. features: hidden states that are wanted, by layer: `i` for those that enter layer `i`, the number of
    layers for those after the final norm, as in `output_hidden_states` of `transformers`; None for all there are: a
    model may have fewer layers than its configuration says.
    """

    tokens: Tensor
    write: Write
    nodes: Nodes | None = None
    tree: DraftTree | None = None
    keep: int | None = 0
    features: Sequence[int] | None = ()

    def wanted(self, layers: int) -> Sequence[int]:
        """`features` of a model of so many layers."""
        return range(layers + 1) if self.features is None else self.features

    @property
    def kept(self) -> tuple[int, int]:
        """Rows and columns whose logits are wanted."""
        rows, width = self.tokens.shape
        return rows, 0 if self.keep is None else min(self.keep, width) if self.keep else width


class Output(NamedTuple):
    """What a pass gives for one part. logits: `[rows, *, vocab]`, of the columns that were asked for. features: one
    `[rows, T, hidden]` for each that was asked for, in that order."""

    logits: Tensor
    features: Sequence[Tensor] = ()


class Runner(ABC):
    """One way to run a model. It makes the positions, masks or plans it needs from the parts.

    Attributes:
        name: for measurements and errors.
        joint: whether several parts become one pass, which reads the weights once.
        reads_prompts: whether unread text may stand before the nodes of a chain in one part.
        sums: see `PassesReport`.
    """

    name: str
    joint = False
    reads_prompts = True
    sums = "torch"

    def refusal(self, part: Part) -> str | None:
        """Why this part must be run in another way; None where it need not."""
        return None

    def stride(self, read: int, most: int) -> int | None:
        """Tokens of a row it would read in one pass over a long text; None where another way is better.

        Args:
            read: slots that are read already. most: tokens that are asked for.
        """
        return most

    @property
    def weights(self) -> Mapping[str, int] | None:
        """Bytes of what a pass reads, by form (see `WeightForm`); None where that is the model's own weights."""
        return None

    def prepared(self) -> AbstractContextManager[None]:
        """Inside the block the model stays as it is, unless `refusal` says otherwise."""
        return nullcontext()

    def reads(self, quantised: Quantised) -> bool:
        """Whether it reads K/V that is kept so."""
        return True

    @property
    def decodes(self) -> bool:
        """Whether `best_chain` can be asked for as the model is now."""
        return False

    def best_chain(self, part: Part, levels: int, vocab: int) -> Tensor:
        """Greedy decoding of several tokens in one go.

        Args:
            part: plain text, one token per row, with room for `levels` of them in its write.
            vocab: only ids below it are candidates.

        Returns:
            int64 `[rows, levels]`: the best token after each row's, the best one after that, and so on; of equal ones
            the first.

        Raises:
            FloatingPointError: NaN in the logits.
        """
        raise NotImplementedError

    @abstractmethod
    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        """Run parts it does not refuse; more than one only where it is `joint`."""


def refuse_wider(part: Part, width: int) -> None:
    """Raises InvalidTreeError for a tree of more nodes than a strict pass may have."""
    if part.tree is not None and part.tree.tokens.shape[1] > width:
        nodes = part.tree.tokens.shape[1]
        raise InvalidTreeError(f"expected a tree of at most {width} nodes (strict_width), got {nodes}")


def joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def outputs(logits: Tensor, features: Sequence[Tensor], parts: Sequence[Part]) -> list[Output]:
    """What each part gets.

    Args:
        logits: `[kept tokens of all parts, vocab]`. features: `[tokens of all parts, hidden]` of each wanted layer, the
            same ones for every part.
    """
    if len(parts) == 1:
        shape = (*parts[0].tokens.shape, -1)
        return [Output(logits.view(*parts[0].kept, logits.shape[1]), [layer.view(shape) for layer in features])]
    kept_counts = [rows * kept for rows, kept in (part.kept for part in parts)]
    counts = [part.tokens.numel() for part in parts]
    split = [layer.split(counts) for layer in features]
    return [
        Output(
            own.view(*part.kept, logits.shape[1]),
            [layer[i].view(*part.tokens.shape, -1) for layer in split],
        )
        for i, (part, own) in enumerate(zip(parts, logits.split(kept_counts), strict=True))
    ]
