"""What a call does to its models while it runs, in whatever order it comes to it, and that nothing of it stays."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from torch._dynamo import eval_frame
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import specdec
from specdec.kv import SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Topology
from specdec.verify.native.library import why_not
from specdec.verify.passes.choose import every_way
from specdec.verify.passes.forward import Forward

ARGUMENTS: dict[str, Any] = dict(do_sample=False, pad_token_id=0, max_new_tokens=8)
native_only = pytest.mark.skipif(why_not() is not None, reason="no native pass")


@pytest.mark.parametrize("hooked", [False, True])
def test_a_model_that_drafts_for_itself_is_left_as_it_was(hooked: bool) -> None:
    """The drafter's block begins later and ends earlier, but its passes may come first."""
    model: Any = copy.deepcopy(models.target("llama-gqa" if hooked else "gpt2"))
    if hooked:  # so that its modules run
        model.model.layers[0].register_forward_hook(lambda *_: None)
    own = model.config._attn_implementation
    ids, _ = models.prompts((6,), models.VOCAB, 2)
    wanted = model.generate(ids, **ARGUMENTS)
    ours = specdec.Speculator(model, model, k=2).generate(ids, **ARGUMENTS)
    assert torch.equal(ours, wanted)  # type: ignore[arg-type]
    assert model.config._attn_implementation == own == "sdpa"
    assert not [name for name, part in model.named_modules() if "forward" in vars(part)]


def test_torch_compiles_again_after_a_call_of_two_compiled_models() -> None:
    target, draft = (copy.deepcopy(model) for model in (models.target("gpt2"), models.draft("near", "gpt2")))
    for model in (target, draft):
        model.compile(backend="eager")
    ids, _ = models.prompts((6,), models.VOCAB, 2)
    seen: list[str] = []
    specdec.Speculator(target, draft, k=2).generate(
        ids, **ARGUMENTS, on_step=lambda _: seen.append(eval_frame._stance.stance)
    )
    assert set(seen) == {"force_eager"}
    assert eval_frame._stance.stance == "default"


@native_only
@pytest.mark.parametrize("draft", [None, "ngram"])
def test_a_hook_may_come_and_go_during_a_call_that_reads_on_afterwards(draft: str | None) -> None:
    """A returned cache is completed by a last prefill."""
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    ids, mask = models.prompts((7, 3), models.VOCAB, 2, 0)
    text = model.generate(ids, attention_mask=mask, **ARGUMENTS)
    arguments = dict(ARGUMENTS, attention_mask=mask, return_dict_in_generate=True)
    arguments["eos_token_id"] = [int(text[0, ids.shape[1] + 2])]
    wanted = model.generate(ids, **arguments)
    hooks: list[Any] = []

    def look(trace: Any) -> None:
        if trace.step == 0:
            hooks.append(model.model.layers[0].register_forward_hook(lambda *_: None))
        if trace.step == 1:
            hooks.pop().remove()

    ours: Any = specdec.Speculator(model, draft).generate(ids, on_step=look, **arguments)
    assert not hooks
    assert torch.equal(ours.sequences, wanted.sequences)


@native_only
def test_a_block_inside_another_leaves_the_outer_its_pass() -> None:
    model: Any = models.target("llama-gqa", "fp32")
    runners = every_way(model)["native"]  # no other to fall back on
    forward, cache = Forward(model, "target", runners), SharedKVCache({"target": num_cache_layers(model)}, 1)
    text = models.prompts((6,), models.VOCAB, 1)[0]
    with forward.prepared():
        with forward.prepared():
            forward.causal(cache, text[:, :3], [0], None, None)
        forward.causal(cache, text[:, 3:], [3], None, None)
    assert cache.filled("target") == [6]
    with pytest.raises(RuntimeError, match="no native pass"):
        forward.causal(cache, text[:, :1], [6], None, None)


def test_graphs_leave_attention_alone_that_is_not_ours_to_replace() -> None:
    """They attend by a plan, which must not take the place of what the model really computes."""

    def flatter(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **{**kwargs, "scaling": kwargs["scaling"] / 3})

    AttentionInterface.register("flatter", flatter)
    model: Any = copy.deepcopy(models.target("llama-gqa"))
    usual = copy.deepcopy(model)
    model.config._attn_implementation = "flatter"
    text = models.prompts((6,), models.VOCAB, 1)[0]
    for own, replays in ((model, 0), (usual, 2)):  # the first pass allocates the storage
        cache = SharedKVCache({"target": num_cache_layers(own)}, 1)
        forward = Forward(own, "target", every_way(own, capture=None)["graphed"])
        graphed: Any = forward.runners[0]
        with torch.no_grad(), forward.prepared():
            forward.causal(cache, text, [0], None, None)
            cache.set_length(0, 6)
            for _ in range(2):
                logits = forward.tree(cache, DraftTree.build(Topology.chain(1), text[:, :2])).logits
            assert graphed.num_replays == replays
        with torch.no_grad():
            wanted = own(torch.cat([text, text[:, :2]], 1)).logits[:, -2:]
        torch.testing.assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # there is something to be wrong about
        assert not torch.allclose(model(text).logits, usual(text).logits, atol=0.01)
