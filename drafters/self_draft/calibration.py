"""What a copy is fitted on: a text, and the inputs that linear layers have in a pass over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from specdec.kv.support import text_config
from specdec.kv.versions import cached

NUM_TEXTS = 16
NUM_TOKENS = 128
"""Tokens of each text that a model writes for its own calibration."""

Fit = Callable[[Tensor], Tensor | None]
"""Given a layer's inputs `[tokens, in]`, what the layer is to give for them instead, `[tokens, out]`, if anything."""


@torch.no_grad()
def own_texts(model: PreTrainedModel) -> Tensor:
    """Texts that the model samples from its own law, int64 `[NUM_TEXTS, NUM_TOKENS]`: the same every time.

    Self-generated calibration (Williams et al. 2024, arXiv 2410.17170): no corpus is needed, and what a chat model
    writes begins as a conversation does.
    """
    config, embeddings = text_config(model), model.get_input_embeddings()
    device = embeddings.weight.device  # type: ignore[union-attr]
    begin = config.bos_token_id if isinstance(config.bos_token_id, int) else 0
    positions = getattr(config, "max_position_embeddings", None) or NUM_TOKENS
    noise = torch.Generator().manual_seed(0)
    columns = [torch.full((NUM_TEXTS, 1), begin, device=device)]
    cache: Any = DynamicCache()
    for _ in range(min(NUM_TOKENS, positions) - 1):
        logits = model(input_ids=columns[-1], use_cache=True, **cached(model, cache)).logits[:, -1]
        law = logits[:, : config.vocab_size].float().softmax(-1).cpu()
        columns.append(torch.multinomial(law, 1, generator=noise).to(device))
    return torch.cat(columns, 1)


@torch.no_grad()
def fit_in_order(model: PreTrainedModel, texts: Sequence[Tensor], fits: dict[nn.Module, Fit]) -> None:
    """Fit layers in the order in which one pass over the texts meets them, each to what those before it give by then.

    Args:
        texts: each int64 `[tokens]`; they are cut to the length of the shortest. fits: by layer.
    """
    width = min(len(text) for text in texts)
    tokens = torch.stack([text[:width] for text in texts])

    def fitted(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        found = fits[layer](inputs[0].flatten(0, -2))
        return None if found is None else found.view(output.shape).to(output.dtype)

    handles = [layer.register_forward_hook(fitted) for layer in fits]
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
