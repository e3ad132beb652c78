"""Native passes take what fits them: storage, weights and threads; everything else is refused or left to torch."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from test_native import caches, forward_of, native, pytestmark  # noqa: F401  (the mark is this module's, too)

import specdec
from specdec.kv import CacheStateError, TargetFaultError
from specdec.kv.versions import CACHE_KEYWORD, cache_of
from specdec.verify.direct import direct_pass
from specdec.verify.native import NativePass, run


@pytest.mark.parametrize("which", [0, 1])
def test_storage_of_another_kind_is_refused(which: int) -> None:
    """Addresses do not say what lies there: a cache that another model wrote must end in an error, not in its bytes."""
    model = models.target("llama-gqa", "fp32")
    text = models.prompts((6,), models.VOCAB, 3)[0]
    for family, dtype in (("llama-gqa", "fp64"), ("llama-gqa", "bf16"), ("llama-mha", "fp32")):
        other, cache = models.target(family, dtype), list(caches(model, 1))[which]
        with torch.no_grad():
            forward_of(other, direct_pass(other)).causal(cache, text, [0], None, keep=1)
            with pytest.raises(CacheStateError, match="was it written by another model"):
                forward_of(model, native(model)).causal(cache, text, [6], None, keep=1)


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
    assert isinstance(native(model), NativePass)
    ids = models.prompts((6,), models.VOCAB, 3)[0]
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    found: Any = specdec.Speculator(model, "ngram", k=2).generate(ids, max_new_tokens=12, do_sample=False)
    assert found.tolist() == wanted.tolist()


def test_weights_that_do_not_fit_the_configuration_are_left_to_the_modules() -> None:
    model: Any = copy.deepcopy(models.target("llama-mha", "fp32"))
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):  # half the heads pruned
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight[:16].clone())
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :16].clone())
    assert direct_pass(model) is None


def test_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        assert NativePass._num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert run.usable_cores() == 2
