"""Native passes take what fits them: storage, weights and threads; everything else is refused or left to torch."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from test_native import caches, pytestmark  # noqa: F401  (the mark is this module's, too)
from ways import forward_by, native_of

import specdec
from specdec.kv import CacheStateError, SharedKVCache, TargetFaultError
from specdec.kv.versions import CACHE_KEYWORD, cache_of
from specdec.verify.passes import native
from specdec.verify.passes.parameters import Parameters

IDS = models.prompts((6,), models.VOCAB, 3)[0]


@pytest.mark.parametrize("which", [0, 1])
def test_storage_of_another_kind_is_refused(which: int) -> None:
    """Addresses do not say what lies there: a cache that another model wrote must end in an error, not in its bytes."""
    model = models.target("llama-gqa", "fp32")
    text = models.prompts((6,), models.VOCAB, 3)[0]
    for family, dtype in (("llama-gqa", "fp64"), ("llama-gqa", "bf16"), ("llama-mha", "fp32")):
        other, cache = models.target(family, dtype), list(caches(model, 1))[which]
        with torch.no_grad():
            forward_by(other, "direct").causal(cache, text, [0], None, keep=1)
            with pytest.raises(CacheStateError, match="was it written by another model"):
                forward_by(model, "native").causal(cache, text, [6], None, keep=1)


def test_a_callers_cache_in_another_dtype_is_an_error() -> None:
    model: Any = models.target("llama-gqa", "fp32")
    ids = models.prompts((6,), models.VOCAB, 3)[0]
    past = cache_of(models.target("llama-gqa", "fp64")(ids[:, :5], use_cache=True))
    with pytest.raises(TargetFaultError, match="K/V of shape"):
        specdec.Speculator(model, "ngram", k=2).generate(
            ids, max_new_tokens=4, do_sample=False, **{CACHE_KEYWORD: past}
        )


def test_a_model_of_which_layers_were_removed_decodes() -> None:
    model: Any = copy.deepcopy(models.target("llama-mqa", "fp32"))
    model.model.layers = model.model.layers[:2]  # its configuration still says three
    assert native_of(model) is not None
    wanted = model.generate(IDS, max_new_tokens=12, do_sample=False)
    found: Any = specdec.Speculator(model, "ngram", k=2).generate(IDS, max_new_tokens=12, do_sample=False)
    assert found.tolist() == wanted.tolist()


def test_weights_that_do_not_fit_the_configuration_are_left_to_the_modules() -> None:
    model: Any = copy.deepcopy(models.target("llama-mha", "fp32"))
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):  # half the heads pruned
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight[:16].clone())
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :16].clone())
    assert Parameters.of(model) is None


def test_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        forward: Any = forward_by(models.target("llama-gqa", "fp32"), "native")
        forward.causal(SharedKVCache({"target": 2}, 1), torch.tensor([[3]]), [0], None, 0)
        assert forward.runners[0]._pass._pass.threads == 2
    finally:
        torch.set_num_threads(before)
    assert native.usable_cores() == 2


def _bias(model: Any, size: tuple[int, ...]) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj.bias = torch.nn.Parameter(torch.full(size, 0.5))


def _norm_of_one(model: Any) -> None:
    model.model.norm.weight = torch.nn.Parameter(torch.ones(1))


def _head_bias(model: Any) -> None:
    model.lm_head.bias = torch.nn.Parameter(torch.ones(1))


def _no_parameter(model: Any) -> None:
    """A weight in another precision that `parameters()` does not list."""
    layer = model.model.layers[1].self_attn.o_proj
    bias = torch.linspace(-1, 1, 32)
    del layer.bias
    layer.bias = bias


def _wide_bias(model: Any) -> None:
    layer = model.model.layers[1].self_attn.o_proj
    del layer.bias
    layer.bias = torch.linspace(-1, 1, 32, dtype=torch.float64)


def _frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]


def _transposed(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())


def _every_second(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = torch.nn.Parameter(torch.linspace(-1, 1, 2 * 48)[::2])


def _other_head_size(model: Any) -> None:
    model.model.layers[1].self_attn.head_dim = 4


def _epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = torch.tensor(1e-6)


MISFITS = {
    "bias of one number": lambda m: _bias(m, (1,)),
    "bias of one row": lambda m: _bias(m, (1, 48)),
    "bias without a dimension": lambda m: _bias(m, ()),
    "norm of one number": _norm_of_one,
    "head's bias of one number": _head_bias,
    "bias in float64": _wide_bias,
    "fewer frequencies": _frequencies,
    "another head size": _other_head_size,
    "an epsilon that is a tensor": _epsilon,
}
"""What modules broadcast, compute otherwise or refuse, and a kernel would read wrong."""
FITTING = {
    "bias of every output": lambda m: _bias(m, (48,)),
    "bias that is no parameter": _no_parameter,
    "a transposed weight": _transposed,
    "a bias of every second number": _every_second,
    "training mode without dropout": lambda m: m.train(),
}


@pytest.mark.parametrize("change", MISFITS)
def test_what_a_kernel_would_read_wrong_is_left_to_the_modules(change: str) -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    assert Parameters.of(model) is not None
    MISFITS[change](model)
    assert Parameters.of(model) is None
    if change in ("bias in float64", "fewer frequencies", "another head size"):  # plain generate fails, too
        return
    same_as_plain(model)


@pytest.mark.parametrize("change", FITTING)
def test_what_fits_is_read_right(change: str) -> None:
    """Control: the direct pass takes these; the native one only weights that lie row by row."""
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    FITTING[change](model)
    assert Parameters.of(model) is not None
    assert (native_of(model) is None) == (change == "a transposed weight")
    same_as_plain(model)


def test_weights_changed_between_calls_are_the_ones_that_count() -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    spec = specdec.Speculator(model, "ngram", k=3)
    same_as_plain(model, spec)
    before = model.generate(IDS, max_new_tokens=12, do_sample=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)  # writes without torch counting it
    model(IDS, labels=IDS).loss.backward()
    optimiser.step()
    assert not torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False), before)
    same_as_plain(model, spec)
    model.resize_token_embeddings(models.VOCAB + 23)
    same_as_plain(model, spec)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(0, 2, models.VOCAB + 23))
    same_as_plain(model, spec)
    model.model.layers[0].mlp.gate_proj.bias = torch.nn.Parameter(torch.ones(1))
    same_as_plain(model, spec)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    model.model.rotary_emb.attention_scaling = 1.25
    same_as_plain(model, spec)
    model.double()
    same_as_plain(model, spec)


def same_as_plain(model: Any, spec: specdec.Speculator | None = None) -> None:
    wanted = model.generate(IDS, max_new_tokens=12, do_sample=False)
    found: Any = (spec or specdec.Speculator(model, "ngram", k=3)).generate(IDS, max_new_tokens=12, do_sample=False)
    assert found.tolist() == wanted.tolist()
