"""A Llama computed from its GGUF file alone, in float64, by the definition llama.cpp follows: an oracle of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from models import build
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.experiments.train_pair.models import train_tokenizer

TEXT = (
    "def parse_args(argv=None):\n    parser = ArgumentParser(description='naïve')\n\treturn parser.parse_args(argv)\n"
)


def merging_tokenizer(vocab_size: int = 280) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges, as the shipped pair's."""
    return train_tokenizer([TEXT] * 20, vocab_size, 256)


def tiny_llama(dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A random Llama with more embedding rows than `merging_tokenizer` has tokens."""
    defaults = dict(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config = tf.LlamaConfig(**{**defaults, **fields})
    return build(tf.LlamaForCausalLM, config, dtype, seed=3, attention="sdpa")


class GgufLlama:
    """`fields` and `tensors` of a file, by GGUF's names, and its logits."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
        self.head_dim = self.fields["llama.rope.dimension_count"]

    def logits(self, ids: list[int]) -> Tensor:
        """float64 `[tokens, vocab]`."""
        x = self._weight("token_embd.weight")[ids]
        later = torch.ones(len(ids), len(ids)).triu(1).bool()
        for layer in range(self.fields["llama.block_count"]):
            at = f"blk.{layer}."
            y = self._norm(x, at + "attn_norm")
            q = self._rotated(self._heads(self._linear(y, at + "attn_q")))
            k = self._rotated(self._heads(self._linear(y, at + "attn_k")))
            v = self._heads(self._linear(y, at + "attn_v"))
            group = q.shape[0] // k.shape[0]
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            scores = (q @ k.mT * self.head_dim**-0.5).masked_fill(later, -torch.inf)
            mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = x + self._linear(mixed, at + "attn_output")
            y = self._norm(x, at + "ffn_norm")
            gated = silu(self._linear(y, at + "ffn_gate")) * self._linear(y, at + "ffn_up")
            x = x + self._linear(gated, at + "ffn_down")
        x = self._norm(x, "output_norm")
        return self._linear(x, "output" if "output.weight" in self.tensors else "token_embd")

    def _weight(self, name: str) -> Tensor:
        return self.tensors[name].double()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self._weight(name + ".bias") if name + ".bias" in self.tensors else None
        return linear(x, self._weight(name + ".weight"), bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.fields["llama.attention.layer_norm_rms_epsilon"]
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self._weight(name + ".weight")

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    def _rotated(self, x: Tensor) -> Tensor:
        """llama.cpp's NORM rope: numbers 2 i and 2 i + 1 of a head are the two coordinates of one plane."""
        exponents = torch.arange(0, self.head_dim, 2).double() / self.head_dim
        speeds = self.fields["llama.rope.freq_base"] ** -exponents
        angles = torch.arange(x.shape[1]).double()[:, None] * speeds
        plane = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(plane * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
