"""The folded attention function: the same numbers as repeating K/V heads, on models of either implementation."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
import transformers
from checker import Case, Drafting, NearTies, compare
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import specdec
from specdec.kv.errors import UnsupportedModelError
from specdec.verify.attention.blocks import BlockPlan
from specdec.verify.attention.fold import folded_attention
from specdec.verify.attention.plan import TreePlan, chain
from specdec.verify.attention.register import NAME, Plan, attending, attention, attention_of


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Repeat every K/V head for its query heads, as transformers does."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    causal = mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


def states(heads: int, kv_heads: int, nodes: int, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(heads * 100 + nodes)
    shapes = ((2, heads, nodes, 16), (2, kv_heads, slots, 16), (2, kv_heads, slots, 16))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize(("nodes", "slots"), [(1, 9), (1, 1), (5, 5), (7, 40), (16, 130)])
def test_folding_is_bitwise_repeating_with_a_mask(heads: int, kv_heads: int, nodes: int, slots: int) -> None:
    """Bitwise for trees; folding turns a single node into several query rows, for which a CPU takes another kernel."""
    query, key, value = states(heads, kv_heads, nodes, slots, torch.float32)
    visible = torch.rand(2, 1, nodes, slots, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    out = folded_attention(query, key, value, mask)
    assert out.is_contiguous()
    if nodes > 1 or heads == kv_heads:
        assert torch.equal(out, reference(query, key, value, mask))
    else:
        torch.testing.assert_close(out, reference(query, key, value, mask), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize(("nodes", "slots"), [(1, 12), (6, 6)])
def test_without_a_mask(heads: int, kv_heads: int, nodes: int, slots: int) -> None:
    """One node sees every slot; as many nodes as slots are plainly causal."""
    query, key, value = states(heads, kv_heads, nodes, slots, torch.float64)
    out = folded_attention(query, key, value, None)
    torch.testing.assert_close(out, reference(query, key, value, None), rtol=1e-13, atol=1e-13)


def test_scaling_reaches_the_kernel() -> None:
    query, key, value = states(4, 2, 1, 9, torch.float64)
    out = folded_attention(query, key, value, None, scaling=0.01)
    scaled = folded_attention(query * (0.01 * 4), key, value, None)
    torch.testing.assert_close(out, scaled)
    assert not torch.allclose(out, folded_attention(query, key, value, None))


def test_both_registries_know_the_name() -> None:
    """With a function but no mask function registered, transformers would drop masks without a word."""
    assert NAME in AttentionInterface.valid_keys(AttentionInterface())
    assert NAME in AttentionMaskInterface.valid_keys(AttentionMaskInterface())


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_the_models_own_attention_comes_back_even_after_an_error(own: str) -> None:
    model = models.target("llama-gqa", attention=own)

    def fail_inside() -> None:
        with attention_of(model) as used:
            assert used == ("eager" if own == "eager" else NAME)
            assert model.config._attn_implementation == used
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_inside()
    assert model.config._attn_implementation == own


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mqa", "mistral-window", "qwen2-mixed-window", "gpt2", "gemma2"])
@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_models_of_either_implementation_decode_correctly(family: str, own: str) -> None:
    for drafting in (Drafting("tree", "near", widths=(2, 2, 1)), Drafting("chain", "near", k=5)):
        ties = NearTies()
        compare(Case(family, "fp32", (7, 3), drafting, 16, attention=own), ties, eos_token_id=None)
        assert ties.ties == 0


def test_our_function_is_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By models whose modules are called; what runs them directly has the same computation inside."""
    calls = []

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return attention(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, counting)
    compare(Case("gpt2", "fp32", (5,), Drafting("none"), 4), NearTies())
    assert calls


def test_a_function_registered_by_the_user_is_kept() -> None:
    """Nobody knows what it computes: replacing it would change the law."""

    def half(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return attention(module, query, key, 0.5 * value, attention_mask, **kwargs)

    AttentionInterface.register("half", half)
    AttentionMaskInterface.register("half", sdpa_mask)
    case = Case("llama-gqa", "fp64", (7, 3), Drafting("tree", "near", widths=(2, 2, 1)), 12, attention="half")
    compare(case, NearTies())
    ids = models.prompts((5,), models.VOCAB, 0)[0]
    ours: list[Any] = [
        specdec.Speculator(target).generate(ids, max_new_tokens=12, do_sample=False)
        for target in (case.target, models.target("llama-gqa"))
    ]
    assert not torch.equal(ours[0], ours[1]), "the function made no difference, so the comparison shows nothing"


@pytest.mark.parametrize(
    "shape", [{"multi_query": True}, {"new_decoder_architecture": True, "num_kv_heads": 2}], ids=str
)
def test_models_that_branch_on_the_name_keep_it(shape: dict[str, Any]) -> None:
    """Falcon compares its attention's name with "sdpa" itself, and computes something else under any other name."""
    config = transformers.FalconConfig(
        vocab_size=models.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
        pad_token_id=0, eos_token_id=None, **shape,
    )  # fmt: skip
    target = models.build(transformers.FalconForCausalLM, config, torch.float64, 0, "sdpa")
    with attention_of(target) as used:
        assert used == "sdpa"
    ids, mask = models.prompts((7, 3), models.VOCAB, 0)
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    plain: Any = target
    wanted = plain.generate(ids, **arguments)
    for drafting in ({"draft": None}, {"draft": target, "k": 3}, {"draft": target, "tree": (2, 2, 1)}):
        out: Any = specdec.Speculator(target, **drafting).generate(ids, **arguments)
        assert torch.equal(out, wanted)


def plan_of(kind: str, length: int, width: int) -> Plan:
    if kind == "blocks":
        return BlockPlan.build(length, tuple(range(-1, width - 1)), width, torch.device("cpu"))
    depths, ancestors = chain(1, width, torch.device("cpu"))
    return TreePlan(torch.tensor([length], dtype=torch.int32), ancestors, depths.to(torch.int32), length, True)


class TestPassesWithAPlan:
    @pytest.mark.parametrize("kind", ["tree", "blocks"])
    @pytest.mark.parametrize("own", ["sdpa", "eager"])
    def test_everything_is_as_before_even_after_an_error_inside_another_pass(self, own: str, kind: str) -> None:
        """Plans swap whatever the attention was, for their own pass alone; the innermost one counts."""
        model = models.target("llama-gqa", "fp64", attention=own)
        ids = models.prompts((6,), models.VOCAB, 0)[0]
        plan = plan_of(kind, 0, 6)
        expected = model(ids).logits

        def nested() -> None:
            with attention_of(model) as used, attending(model, plan_of("tree", 0, 3), {}):
                with attending(model, plan, {}) as mask:
                    assert model.config._attn_implementation == NAME
                    logits = model(ids, attention_mask=mask).logits
                    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # eager rounds to float32
                assert model.config._attn_implementation == NAME
                raise RuntimeError(used)

        with torch.no_grad(), pytest.raises(RuntimeError, match="eager" if own == "eager" else NAME):
            nested()
        assert model.config._attn_implementation == own
        with attention_of(model), torch.no_grad():  # no plan was left behind
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", ["tree", "blocks"])
    def test_another_model_in_the_middle_of_a_pass_has_masks_of_its_own(self, kind: str) -> None:
        target, other = models.target("llama-gqa", "fp64"), models.draft("near", "llama-gqa", "fp64")
        ids = models.prompts((6,), models.VOCAB, 0)[0]
        with torch.no_grad():
            expected: Any = other(ids[:, :4]).logits
            seen: list[Any] = []
            hook = target.get_submodule("model.layers.0").register_forward_hook(
                lambda *_: seen.append(other(ids[:, :4]).logits)
            )
            with hook, attention_of(target), attention_of(other):
                with attending(target, plan_of(kind, 0, 6), {}) as mask:
                    target(ids, attention_mask=mask)
        torch.testing.assert_close(seen, [expected])

    @pytest.mark.parametrize(
        ("kind", "term", "says"),
        [
            ("tree", "s_aux", "LlamaAttention has s_aux in its attention, which tree attention does not compute"),
            ("tree", "softcap", "has softcap in its attention.* attn_implementation='eager'"),
            (
                "blocks",
                "sinks",
                "has sinks in its attention, which exactness='strict' does not compute; use exactness=",
            ),
            ("tree", "dropout", r"has dropout=0.5 \(call model.eval\(\)\)"),
            ("blocks", "dropout", r"has dropout=0.5 \(call model.eval\(\)\)"),
        ],
    )
    def test_terms_that_it_does_not_compute_are_refused_by_name(self, kind: str, term: str, says: str) -> None:
        model = models.target("llama-gqa")
        states = torch.zeros(1, 1, 1, 4)
        with attending(model, plan_of(kind, 0, 1), {}) as mask, pytest.raises(UnsupportedModelError, match=says):
            attention(model.get_submodule("model.layers.0.self_attn"), states, states, states, mask, **{term: 0.5})

    def test_every_layer_type_gets_a_mask_of_its_own(self) -> None:
        model = models.target("llama-gqa")
        windows = {"full_attention": None, "sliding_attention": 3}
        with attending(model, plan_of("blocks", 2, 4), windows) as masks:
            counts = {kind: mask.sum(-1).flatten().tolist() for kind, mask in masks.items()}
        assert counts == {"full_attention": [3, 4, 5, 6], "sliding_attention": [3, 3, 3, 3]}
        with attending(model, plan_of("blocks", 2, 4), {"sliding_attention": 3}) as mask:
            assert torch.equal(mask, masks["sliding_attention"])


@pytest.mark.parametrize("own", ["sdpa", "eager", "flash_attention_2"])
def test_models_with_a_soft_cap_attend_as_plain_decoding_does(own: str) -> None:
    """Under "sdpa" older transformers leave the cap out and newer ones refuse; flash attention computes it."""
    model: Any = copy.deepcopy(models.target("gemma2"))
    assert model.config.attn_logit_softcapping is not None
    model.config._attn_implementation = own
    with attention_of(model) as used:
        assert used == ("sdpa" if own == "sdpa" else "eager")
    assert model.config._attn_implementation == own
