"""Models of real shapes with made-up weights, whose greedy text is known and whose drafter agrees as often as asked.

Every block's output is scaled down until the residual stream is the last token's embedding, and the row of the output
head that belongs to token `t + STEP` is the embedding of `t`. So the greedy text counts on in steps of STEP, with a
margin far above rounding; a draft model built the same way errs on chosen tokens. The work is that of the shape.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters import Budget, Drafter, Session
from specdec.experiments.gpu.options import Shape
from specdec.verify import DraftTree, Topology
from specdec.verify.draft_kind import DraftKind

STEP = 101
FAINT = 1e-3
"""Scale of the blocks' outputs."""


def counting_llama(
    shape: Shape, device: str, dtype: torch.dtype, seed: int, alpha: float = 1.0, positions: int = 1 << 17
) -> PreTrainedModel:
    """A Llama whose greedy next token is `successor(token)`, on all but about a fraction `1 - alpha` of the tokens."""
    config = tf.LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    devices = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        model: Any = tf.LlamaForCausalLM._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(FAINT)
            layer.mlp.down_proj.weight.mul_(FAINT)
        embeddings = model.model.embed_tokens.weight
        model.lm_head.weight.copy_(embeddings.roll(STEP, 0))
        generator = torch.Generator().manual_seed(seed + 1)
        wrong = (torch.rand(shape.vocab, generator=generator) >= alpha).nonzero().flatten()
        if len(wrong) > 1:  # these tokens' successors change places
            rows = ((wrong + STEP) % shape.vocab).to(device)
            model.lm_head.weight[rows.roll(1)] = model.lm_head.weight[rows]
    made: PreTrainedModel = model.eval()
    return made


def successor(tokens: Tensor, vocab: int) -> Tensor:
    """The target's greedy next tokens."""
    return (tokens + STEP) % vocab


class Oracle(Drafter):
    """Proposes the target's own greedy continuation, each token with chance `alpha`, else a wrong one. It is free.

    What it errs on is a function of token and seed, so every k is judged on the same text.
    """

    name = "oracle"

    def __init__(self, vocab: int, k: int, alpha: float, seed: int = 0) -> None:
        self.max_depth = self.max_nodes = k
        self._vocab = vocab
        self._right = torch.rand(vocab, generator=torch.Generator().manual_seed(seed)) < alpha
        self._session: Session | None = None

    @property
    def kind(self) -> DraftKind:
        return DraftKind("chain", "deterministic")

    def start(self, session: Session) -> None:
        self._session = session
        self._right = self._right.to(session.rows.device)

    def finish(self) -> None:
        self._session = None

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None, "propose() before start()"
        roots = self._session.rows.roots()
        depth = min(self.max_depth, budget.max_depth, budget.max_nodes)
        columns = [roots]
        for _ in range(depth):
            last = columns[-1]
            columns.append((last + STEP * torch.where(self._right[last], 1, 2)) % self._vocab)
        return DraftTree.build(Topology.chain(depth), torch.stack(columns, 1))
