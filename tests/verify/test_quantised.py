"""Quantised layers of other packages are read as the numbers they multiply with, or left to their modules.

The layers here keep what the packages keep, under the same names; those of torchao, quanto and bitsandbytes themselves
are run where they are installed (tests/kv/test_module_weights.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from specdec import SelfDrafter, Speculator
from specdec.kv.errors import UnsupportedArgumentError, UnsupportedModelError
from specdec.verify.native.library import why_not
from specdec.verify.passes.choose import runs_natively
from specdec.verify.quantised import mixes_tokens, packed_of, weight_of_quantised

IDS, MASK = models.prompts((9,), 64, 2, 4)
DTYPES = [torch.float32, torch.bfloat16]


def base(dtype: torch.dtype = torch.float32) -> Any:
    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128
    )
    config = tf.LlamaConfig(**sizes, num_hidden_layers=2, initializer_range=0.1, pad_token_id=0, eos_token_id=None)
    return models.build(tf.LlamaForCausalLM, config, dtype, 1, "sdpa")


class Int8Tensor(Tensor):
    """As torchao's: products with the codes, then times the scale of the row."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block_size: list[int]
    act_quant_kwargs: Any

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype, rounds: Any = None) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)

    def __init__(self, qdata: Tensor, scale: Tensor, dtype: torch.dtype, rounds: Any = None):
        self.qdata, self.scale, self.act_quant_kwargs = qdata, scale, rounds
        self.block_size, self.zero_point = [1, qdata.shape[1]], torch.zeros_like(scale, dtype=torch.int8)

    @classmethod
    def of(cls, weight: Tensor, rounds: Any = None) -> Int8Tensor:
        scale = weight.float().abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale, weight.dtype, rounds)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["qdata", "scale"], None

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return "Int8Tensor"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight = args[:2]
            return x @ weight.qdata.t().to(x.dtype) * weight.scale.to(x.dtype).flatten()
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].qdata, args[0].scale, args[0].dtype, args[0].act_quant_kwargs)
        raise NotImplementedError(f"Int8Tensor: {function}")


def words(codes: Tensor, order: list[int]) -> Tensor:
    """Numbers 0 .. 15 `[..., n]` as int32 `[..., n / 8]`: number `order[i]` of eight in bits `4 i`."""
    eight = codes.to(torch.int64).unflatten(-1, (-1, 8))[..., order]
    word = (eight << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


class Words(nn.Module):
    """As gptqmodel's layers: 4-bit codes in words, GPTQ's along the inputs, AWQ's along the outputs."""

    def __init__(self, layer: nn.Linear, form: str, group: int = 32):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        weight = layer.weight.detach().float().unflatten(1, (-1, group))
        low, high = weight.amin(-1), weight.amax(-1)
        scales = ((high - low) / 15).to(layer.weight.dtype)
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = (weight / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
        self.own = ((codes - zeros[..., None]) * scales.float()[..., None]).flatten(1).to(layer.weight.dtype)
        codes, natural = codes.flatten(1), list(range(8))
        if form == "awq":
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            packed, zero_words = words(codes.t(), order), words(zeros.t(), order)
        else:
            packed, zero_words = words(codes, natural).t(), words((zeros.t() - int(form == "gptq")) % 16, natural)
        self.register_buffer("qweight", packed.contiguous())
        self.register_buffer("qzeros", zero_words)
        self.register_buffer("scales", scales.t().contiguous())
        if form != "awq":
            self.register_buffer("g_idx", torch.arange(self.in_features) // group)
        self.bits, self.bias = 4, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.own, self.bias)


Words.__module__ = "gptqmodel.nn_modules"


def quantised(form: str, dtype: torch.dtype = torch.float32, rounds: Any = None) -> Any:
    model = base(dtype)
    for part in list(model.model.modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear and form == "int8":
                layer.weight = nn.Parameter(Int8Tensor.of(layer.weight.detach(), rounds), requires_grad=False)
            elif type(layer) is nn.Linear:
                setattr(part, name, Words(layer, form).eval())
    return model


def texts(model: Any, drafts: tuple[Any, ...]) -> None:
    options: dict[str, Any] = dict(attention_mask=MASK, max_new_tokens=8, do_sample=False)
    plain = model.generate(IDS, **options)
    for draft in drafts:
        spec = Speculator(model, draft, k=None if draft is None else 3)
        assert torch.equal(torch.as_tensor(spec.generate(IDS, **options)), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "gptq", "gptq_v2", "awq"])
def test_products_of_codes_and_scales_are_read(form: str, dtype: torch.dtype) -> None:
    model = quantised(form, dtype)
    layer = model.model.layers[1].mlp.down_proj
    packed = packed_of(layer)
    assert packed is not None
    assert packed.bits == (8 if form == "int8" else 4)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    error = layer(x).float() - F.linear(x.float(), packed.dequantized())
    assert error.abs().max() < (1e-5 if dtype == torch.float32 else 3e-2)
    assert packed_of(layer) is packed  # not unpacked again
    assert runs_natively(model) == (why_not() is None)
    if dtype == torch.float32:
        texts(model, (None, "ngram", base()))


def test_int8_codes_are_shared_and_changes_are_seen() -> None:
    layer = quantised("int8").model.layers[0].mlp.up_proj
    packed = packed_of(layer)
    assert packed is not None
    assert packed.codes.data_ptr() == layer.weight.qdata.data_ptr()
    layer.weight.scale.mul_(2)
    again = packed_of(layer)
    assert again is not None
    assert torch.equal(again.scales, 2 * packed.scales) or again.scales.data_ptr() == packed.scales.data_ptr()
    layer.weight = nn.Parameter(Int8Tensor.of(torch.ones(128, 64)), requires_grad=False)
    assert weight_of_quantised(layer).mean() == pytest.approx(1.0)


def other_law(layer: Any) -> None:
    layer.own = layer.own * 1.01


def other_order(layer: Any) -> None:
    layer.g_idx = layer.g_idx.flip(0)


def another_home(layer: Any) -> None:
    layer.__class__ = type("Words", (Words,), {"__module__": "somebody"})


@pytest.mark.parametrize("change", [other_law, other_order, another_home])
def test_what_computes_something_else_is_left_to_its_module(change: Callable[[Any], None]) -> None:
    model = quantised("gptq")
    change(model.model.layers[0].mlp.up_proj)
    assert packed_of(model.model.layers[0].mlp.up_proj) is None
    assert not runs_natively(model)
    texts(model, ("ngram",))


def test_rounded_activations_are_left_to_their_module() -> None:
    model = quantised("int8", rounds=SimpleNamespace(granularity=None))
    assert packed_of(model.model.layers[0].mlp.up_proj) is None
    assert mixes_tokens(model) is None


class Linear8bitLt(nn.Linear):
    """As bitsandbytes': columns with an outlier in any token are multiplied in 16 bits for all of them."""


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_a_target_that_mixes_tokens_is_refused(threshold: float) -> None:
    model = base()
    model.model.layers[0].mlp.up_proj.__class__ = Linear8bitLt
    model.model.layers[0].mlp.up_proj.state = SimpleNamespace(threshold=threshold)
    if threshold:
        with pytest.raises(UnsupportedModelError, match=r"LLM\.int8 .* llm_int8_threshold=0\.0"):
            Speculator(model, "ngram")
        texts(base(), (model,))  # as a draft it costs no exactness
    else:
        texts(model, ("ngram",))


def test_one_scale_for_all_tokens_is_refused() -> None:
    granularity = type("PerTensor", (), {})()
    with pytest.raises(UnsupportedModelError, match="one scale for all tokens"):
        Speculator(quantised("int8", rounds=SimpleNamespace(granularity=granularity)))


def test_a_self_drafter_of_another_target_is_refused() -> None:
    model, other = base(), base()
    drafter = SelfDrafter(other, "int8", k=2)
    with pytest.raises(UnsupportedArgumentError, match="SelfDrafter of this target"):
        Speculator(model, drafter)
    texts_of = Speculator(other, drafter).generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False)
    assert torch.as_tensor(texts_of).shape[1] == IDS.shape[1] + 3


@pytest.mark.parametrize("form", ["self:int8", "self:int4", "self:hot50", "self:exit1"])
@pytest.mark.parametrize("target", ["int8", "gptq"])
def test_quantised_targets_draft_for_themselves(target: str, form: str) -> None:
    texts(quantised(target), (form,))


def test_a_self_drafter_takes_the_targets_own_codes() -> None:
    model = quantised("int8")
    copy: Any = SelfDrafter(model, "int8").copy
    own, theirs = (one.model.layers[0].mlp.up_proj for one in (copy.model, model))
    assert own.codes.data_ptr() == theirs.weight.qdata.data_ptr()


@pytest.mark.parametrize("rounds", [None, SimpleNamespace(granularity=None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_found_by_unit_vectors_where_a_layout_is_not_read(dtype: torch.dtype, rounds: Any) -> None:
    layer = quantised("int8", dtype, rounds).model.layers[0].mlp.up_proj
    found, held = weight_of_quantised(layer), layer.weight.qdata * layer.weight.scale
    assert found.dtype == dtype
    assert (found - held).abs().max() < (1e-6 if dtype == torch.float32 else 2e-3)


def test_a_write_past_torchs_counts_is_seen() -> None:
    layer: Any = next(part for part in quantised("gptq").modules() if isinstance(part, Words))
    before = packed_of(layer)
    assert before is not None
    layer.scales.data.mul_(2)
    own: Any = layer.own
    own.data.mul_(2)
    after = packed_of(layer)
    assert after is not None
    assert torch.equal(after.scales, before.scales * 2)
