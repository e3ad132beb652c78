"""A rule that is asked for decides sampling; greedy decoding stays greedy whatever the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.verify.rules import RULES


@pytest.mark.parametrize("rule", sorted(RULES))
def test_greedy_output_does_not_depend_on_the_rule(rule: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double().eval()
    prompt = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(prompt, **settings)
    ours: Any = specdec.Speculator(model, model, k=3, rule=rule).generate(prompt, **settings)
    assert torch.equal(ours, plain)
