"""What a copy is fitted on: a text, and the inputs that linear layers have in a pass over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.shared import SharedKVCache
from specdec.kv.support import num_cache_layers, text_config
from specdec.kv.versions import cached
from specdec.verify.passes.forward import Forward

NUM_TEXTS = 32
NUM_TOKENS = 128
"""Tokens of each text that a model writes for its own calibration."""

_DAMPING = 0.05
"""Share of the mean square of all inputs that is added to each one's."""


class Inputs:
    """What a linear layer is given in a pass over the text: `tokens`, float32 `[tokens, in]`.

    Layers that are given the same (queries, keys and values) share what is computed of it.
    """

    def __init__(self, tokens: Tensor):
        self.tokens = tokens.flatten(0, -2).float()

    @cached_property
    def hessian(self) -> Tensor:
        """`tokens^T tokens`, damped, `[in, in]`."""
        hessian = self.tokens.t() @ self.tokens
        hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean() + 1e-12)
        return hessian

    @property
    def squares(self) -> Tensor:
        """Sums of squares `[in]`, damped."""
        return self.hessian.diagonal()

    @cached_property
    def order(self) -> Tensor:
        """Columns, those with the largest inputs first."""
        return self.squares.argsort(descending=True)

    @cached_property
    def upper(self) -> Tensor:
        """The Cholesky factor of the Hessian's inverse, columns in that order."""
        ordered = self.hessian[self.order][:, self.order]
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True).contiguous()


Fit = Callable[[Inputs], Tensor | None]
"""Given a layer's inputs, the weight `[out, in]` that the layer is to have from then on, if it is to have another."""


@torch.no_grad()
def own_texts(model: PreTrainedModel) -> Tensor:
    """Texts that the model samples from its own law, int64 `[NUM_TEXTS, NUM_TOKENS]`: the same every time.

    Self-generated calibration (Williams et al. 2024, arXiv 2410.17170): no corpus is needed, and what a chat model
    writes begins as a conversation does.

    Raises:
        UnsupportedArgumentError: NaN in its logits.
    """
    config, forward = text_config(model), Forward(model, "target")
    device: Any = model.get_input_embeddings().weight.device
    begin = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    length = min(NUM_TOKENS, forward.num_positions or NUM_TOKENS)
    noise = torch.Generator().manual_seed(0)
    columns = [torch.full((NUM_TEXTS, 1), begin, device=device)]
    cache = SharedKVCache({"target": num_cache_layers(model)}, NUM_TEXTS, length)
    with forward.prepared():
        for place in range(length - 1):
            logits = forward.causal(cache, columns[-1], [place] * NUM_TEXTS, None, 0).logits[:, -1]
            law = logits[:, : config.vocab_size].float().softmax(-1).cpu()
            if not bool(law.isfinite().all()):
                raise UnsupportedArgumentError(
                    f"draft 'self:...': expected texts that {type(model).__name__} samples from its own law, to choose "
                    "by them what a copy needs, got NaN in its logits. Look at its weights, or give SelfDrafter texts "
                    "that it can read (calibration=)"
                )
            columns.append(torch.multinomial(law, 1, generator=noise).to(device))
    return torch.cat(columns, 1)


class _TargetsOwn(DynamicCache):
    """Keeps nothing: the second half of a batch is given the keys and values of the first."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        half = len(key_states) // 2
        return key_states[:half].repeat(2, 1, 1, 1), value_states[:half].repeat(2, 1, 1, 1)


@torch.no_grad()
def fit_in_order(model: PreTrainedModel, texts: Sequence[Tensor], fits: dict[nn.Module, Fit]) -> None:
    """Fit layers in the order in which one pass over the texts meets them, each to what those before it give by then.

    As a copy does when it drafts, it reads the target's own keys and values: every text is there twice, first as the
    target reads it.

    Args:
        texts: each int64 `[tokens]`; they are cut to the length of the shortest. fits: by layer.
    """
    width = min(len(text) for text in texts)
    tokens = torch.stack([text[:width] for text in texts])
    whole = 2 * len(tokens), 2 * tokens.numel()
    inner: Any = model.base_model

    seen: list[Any] = [None, None]

    def fitted(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        first = len(given[0]) // 2 if len(given[0]) in whole else 0  # some layers see only some of the tokens
        if seen[0] is not given[0]:
            seen[:] = given[0], Inputs(given[0][first:])
        weight = fits[layer](seen[1])
        bias: Any = layer.bias
        if weight is None:
            return None
        return torch.cat([output[:first], F.linear(given[0][first:], weight.to(output.dtype), bias)])

    handles = [layer.register_forward_hook(fitted) for layer in fits]
    try:
        inner(input_ids=tokens.repeat(2, 1), **cached(inner, _TargetsOwn()))
    finally:
        for handle in handles:
            handle.remove()
