"""A GGUF file holds the model it was made from: its weights, its logits by llama.cpp's definition, its tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_llama import GgufLlama, merging_tokenizer, tiny_llama
from models import BUILDERS, build
from tiny_pair import byte_tokenizer
from tokenizers import pre_tokenizers
from torch import Tensor
from typer.testing import CliRunner

from specdec.experiments.bench.gguf_export import main
from specdec.kv import UnsupportedArgumentError
from specdec.pairing import gguf
from specdec.pairing.gguf import export_model, interleaved, refusal
from specdec.shipped import pair_folder

TOKENIZER = merging_tokenizer()
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "bias": {"attention_bias": True, "mlp_bias": True},
    "odd-sizes": {
        "head_dim": 12,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers.", "blk.")


def halves_again(stored: Tensor, head_dim: int) -> Tensor:
    """Undo `interleaved`, written differently: even rows of a head first, then odd ones."""
    heads = stored.split(head_dim)
    return torch.cat([part for head in heads for part in (head[0::2], head[1::2])])


def test_the_documented_order() -> None:
    assert interleaved(torch.arange(6), 1).tolist() == [0, 3, 1, 4, 2, 5]
    assert interleaved(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert halves_again(interleaved(torch.arange(24), 4), 6).tolist() == list(range(24))


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tensor_comes_back(shape: str, dtype: str, tmp_path: Path) -> None:
    model = tiny_llama(**SHAPES[shape])
    stored = GgufLlama(export_model(model, TOKENIZER, tmp_path / "m.gguf", dtype)).tensors
    wanted = {gguf_name(name): weight for name, weight in model.named_parameters()}
    assert stored.keys() == wanted.keys()
    for name, weight in wanted.items():
        half = dtype == "f16" and weight.dim() > 1
        assert stored[name].dtype is (torch.float16 if half else torch.float32), name
        got = (
            halves_again(stored[name], model.config.head_dim) if "attn_q" in name or "attn_k" in name else stored[name]
        )
        assert torch.equal(got, weight.half() if half else weight), name


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_models(shape: str, tmp_path: Path) -> None:
    model = tiny_llama(**SHAPES[shape])
    loaded = GgufLlama(export_model(model, TOKENIZER, tmp_path / "m.gguf"))
    ids = list(range(5, 60, 3))
    with torch.no_grad():
        wanted = model.double()(torch.tensor([ids]), use_cache=False).logits[0]
    # eps and theta are float32 in the file.
    torch.testing.assert_close(loaded.logits(ids), wanted, rtol=1e-5, atol=1e-5)


def test_the_logits_notice_rows_in_transformers_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "interleaved", lambda weight, num_heads: weight)
    model = tiny_llama()
    loaded = GgufLlama(export_model(model, TOKENIZER, tmp_path / "m.gguf"))
    ids = list(range(5, 60, 3))
    with torch.no_grad():
        wanted = model.double()(torch.tensor([ids]), use_cache=False).logits[0]
    assert float((loaded.logits(ids) - wanted).abs().max()) > 0.1


def test_the_tokenizer_comes_back(tmp_path: Path) -> None:
    fields = GgufLlama(export_model(tiny_llama(), TOKENIZER, tmp_path / "m.gguf")).fields
    size = len(TOKENIZER)
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][:size] == TOKENIZER.convert_ids_to_tokens(list(range(size)))
    assert fields["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, 288)]
    control, normal, unused = 3, 1, 5
    assert fields["tokenizer.ggml.token_type"] == [control] + [normal] * (size - 1) + [unused] * (288 - size)
    merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
    assert len(merges) == size - 257
    assert all("".join(merge) in TOKENIZER.get_vocab() for merge in merges)
    assert [fields[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "padding")] == [0, 0, 0]
    assert not fields["tokenizer.ggml.add_bos_token"]
    assert not fields["tokenizer.ggml.add_eos_token"]


def spaced() -> Any:
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def test_what_cannot_be_said_in_gguf_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    def refused(message: str, model: Any, tokenizer: Any = TOKENIZER, dtype: str = "f32") -> None:
        with pytest.raises(UnsupportedArgumentError, match=message):
            export_model(model, tokenizer, tmp_path / "m.gguf", dtype)
        assert list(tmp_path.iterdir()) == []

    def family(name: str) -> Any:
        cls, config = BUILDERS[name]()
        return build(cls, config, torch.float32, 0, "sdpa")

    refused("expected one of f32, f16, got 'q4_0'", tiny_llama(), dtype="q4_0")
    refused("model_type 'llama', got 'gpt2'", family("gpt2"))
    refused("rope_type 'default', got 'llama3'", family("llama-rope-llama3"))
    refused("hidden_act 'silu', got 'relu'", tiny_llama(hidden_act="relu"))
    refused(r"\(has merges True\), got has merges False", tiny_llama(), byte_tokenizer())
    refused("add_prefix_space True", tiny_llama(), spaced())
    refused("vocab_size 270, got 279", tiny_llama(vocab_size=270))
    large = tiny_llama()
    with torch.no_grad():
        large.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    refused("finite in f16, got 'model.layers.1.mlp.up_proj.weight'", large, dtype="f16")


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'specdec-lm[llamacpp]'" in str(refusal(pair_folder() / "target"))


def test_the_shipped_pair_is_taken(tmp_path: Path, tiny_pair: Path) -> None:
    assert refusal(pair_folder() / "target") is None
    assert "has merges" in str(refusal(tiny_pair / "target"))
    tiny_llama(vocab_size=270).config.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert "vocab_size 270" in str(refusal(tmp_path))


def test_command(tmp_path: Path) -> None:
    for role, layers in (("target", 2), ("draft", 1)):
        tiny_llama(torch.float16, num_hidden_layers=layers).save_pretrained(tmp_path / "pair" / role)
    TOKENIZER.save_pretrained(tmp_path / "pair" / "target")  # the draft borrows it
    out = tmp_path / "out"
    done = CliRunner().invoke(main.app, ["--pair", str(tmp_path / "pair"), "--out", str(out), "--dtype", "f16"])
    assert done.exit_code == 0, done.output
    assert [GgufLlama(out / f"{role}-f16.gguf").fields["llama.block_count"] for role in ("target", "draft")] == [2, 1]
    done = CliRunner().invoke(main.app, ["--pair", "no-such-pair", "--out", str(out)])
    assert done.exit_code == 2
