"""The runner of strict mode where there is no native pass: every row alone, every tree padded to one width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.verify.attention.blocks import BlockPlan
from specdec.verify.attention.register import attending
from specdec.verify.passes.base import Output, Part, Runner, refuse_wider
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.linear import own_linears
from specdec.verify.passes.modules import ModelCall, Modules


class Strict(Runner):
    """Logits and K/V of a node do not depend, to the bit, on the draft around it.

    Matrix products of one size give a row the same bits wherever it stands and whatever the other rows hold; products
    of different sizes do not. So each row of the batch has a pass of its own, always `width` nodes wide, and attention
    is that of a `BlockPlan`. A row's prefill is its own pass, too: nothing depends on the batch.

    Args:
        width: nodes per pass, padding included.
    """

    name = "strict"
    reads_prompts = False

    def __init__(self, model: PreTrainedModel, inputs: Inputs, width: int):
        self._model, self._inputs, self._width = model, inputs, width
        self._call = ModelCall(model)
        self._modules = Modules(model, inputs)

    def prepared(self) -> AbstractContextManager[None]:
        return self._modules.prepared()

    def refusal(self, part: Part) -> str | None:
        refuse_wider(part, self._width)
        return None

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        (part,) = parts
        rows = range(len(part.tokens))
        self._modules.fit()
        with own_linears():
            given = [self._text(part, row) if part.tree is None else self._tree(part, row) for row in rows]
        return [_together(part, given)]

    def _text(self, part: Part, row: int) -> Output | None:
        """One row's text, without its padding; None where there is nothing else."""
        count = part.tokens.shape[1] if part.write.valid is None else part.write.valid[row]
        tokens, write = part.tokens[row : row + 1, :count], part.write.row(row, count)
        return self._modules([part._replace(tokens=tokens, write=write)])[0] if count else None

    def _tree(self, part: Part, row: int) -> Output:
        """One row's tree, padded; of what is behind it nothing means anything."""
        tree = part.tree
        assert tree is not None
        count = int(tree.num_nodes[row])
        parents = tree.parents[row].tolist() if tree.topology is None else tree.topology.parents
        length = part.write.starts[row]
        plan = BlockPlan.build(length, tuple(parents[:count]), self._width, part.tokens.device)
        padding = part.tokens[row, :1].expand(self._width - count)
        tokens = torch.cat([part.tokens[row, :count], padding])[None]
        alone = part._replace(tokens=tokens, write=part.write.row(row, self._width))
        positions = self._inputs.usable(plan.positions[None])
        with attending(self._model, plan, self._inputs.windows) as mask:
            return self._call(alone, positions, mask)


def _together(part: Part, given: Sequence[Output | None]) -> Output:
    """Of all rows, as wide as the part: cut, or filled with zeros where a row was shorter."""
    (rows, kept), width = part.kept, part.tokens.shape[1]
    found = {row: own for row, own in enumerate(given) if own is not None}
    layers = len(next(iter(found.values())).features)
    features = [_filled({row: own.features[i] for row, own in found.items()}, rows, width) for i in range(layers)]
    return Output(_filled({row: own.logits for row, own in found.items()}, rows, kept), features)


def _filled(states: Mapping[int, Tensor], rows: int, width: int) -> Tensor:
    """`[rows, width, *]` from `[1, *, *]` of some rows."""
    whole = next(iter(states.values())).new_zeros(rows, width, next(iter(states.values())).shape[-1])
    for row, own in states.items():
        whole[row, : own.shape[1]] = own[0, :width]
    return whole
