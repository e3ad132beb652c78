"""Weights that are not the numbers they hold (quantised, parametrised, adapted): their modules compute, as in plain
decoding, whether the model is Llama-shaped (passes past its modules) or not (few-row linear layers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from specdec import Engine, Speculator
from specdec.verify import stock
from specdec.verify.passes import forward, linear
from specdec.verify.weights import fingerprint

IDS, MASK = models.prompts((9, 5, 7), 64, 2, 4)


def base(family: str) -> Any:
    """Big enough for other forms of few-row products."""
    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=192, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256
    )
    rest: dict[str, Any] = dict(num_hidden_layers=2, initializer_range=0.1, pad_token_id=0, eos_token_id=None)
    if family == "llama":
        return models.build(tf.LlamaForCausalLM, tf.LlamaConfig(**sizes, **rest), torch.float32, 1, "sdpa")
    config = tf.GemmaConfig(**sizes, **rest, head_dim=48)
    return models.build(tf.GemmaForCausalLM, config, torch.float32, 1, "sdpa")


class Eighths(Tensor):
    """A weight kept as int8 eighths of a scale; like torchao's it knows products and little else."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight: Tensor) -> Eighths:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return "Eighths"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            x, weight = args[0], args[1]
            return F.linear(x, weight.codes * weight.scale, *args[2:], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"Eighths: {function}")


class Lying(Tensor):
    """Multiplies otherwise than its numbers say: whoever takes it apart gives another text, without an error."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (F.linear, torch.mm):
            return super().__torch_function__(function, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            out: Tensor = function(*args, **(kwargs or {}))
        return (1.7 if function is F.linear else 1.0) * out.as_subclass(Tensor)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.7 * super().forward(x)


class Adapted(nn.Module):
    """A layer with a low-rank adapter around it, as peft puts there."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(0.2 * torch.randn(4, layer.in_features, generator=generator))
        self.b = nn.Parameter(0.2 * torch.randn(layer.out_features, 4, generator=generator))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.a), self.b)


class Bent(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight + 0.1 * weight.flip(0)


def weights(make: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.modules():
            if type(layer) is nn.Linear:
                layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)

    return change


def one(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def change_each(model: Any) -> None:
        for layer in model.model.layers:
            change(layer.mlp.up_proj)

    return change_each


def old_norm(layer: Any) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)
    layer.weight_g.data *= 2  # the weight itself is made anew before each pass only


def adapted(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj)
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)


def attribute(layer: nn.Linear) -> None:
    weight = 1.5 * layer.weight.detach()
    del layer._parameters["weight"]
    layer.__dict__["weight"] = weight


def new_norm(layer: Any) -> None:
    parametrizations.weight_norm(layer)
    layer.parametrizations["weight"].original0.data *= 2


CHANGES: dict[str, Callable[[Any], None]] = {
    "int8 subclass": weights(Eighths.of),
    "lying subclass": weights(lambda weight: weight.as_subclass(Lying)),
    "Linear subclass": one(lambda layer: setattr(layer, "__class__", Doubled)),
    "adapters": adapted,
    "parametrized": one(lambda layer: parametrize.register_parametrization(layer, "weight", Bent())),
    "weight_norm": one(new_norm),
    "weight_norm of old": one(old_norm),
    "spectral_norm": one(parametrizations.spectral_norm),
    "pruned": one(lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4)),
    "attribute": one(attribute),
    "late bias": one(lambda layer: layer.register_parameter("bias", nn.Parameter(torch.linspace(-1, 1, 256)))),
}


def changed(family: str, name: str) -> Any:
    model = base(family)
    CHANGES[name](model)
    return model.eval()


def compare(model: Any, drafts: tuple[Any, ...]) -> Tensor:
    """Drafted texts of one row, then of a padded batch; returns plain decoding's."""
    for rows in (slice(0, 1), slice(0, 3)):
        options: dict[str, Any] = dict(attention_mask=MASK[rows], max_new_tokens=7, do_sample=False)
        plain: Tensor = model.generate(IDS[rows], **options)
        for draft in drafts:
            speculator = Speculator(model, draft, k=3)
            text: Any = speculator.generate(IDS[rows], **options)
            assert torch.equal(text, plain)
            report = speculator.report
            assert report is not None
            assert report.num_drafter_faults == 0, report.last_drafter_fault
    return plain


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("name", list(CHANGES))
def test_the_text_is_plain_generates(name: str, family: str) -> None:
    model, ordinary = changed(family, name), base(family)
    text = compare(model, ("ngram", ordinary))
    assert not torch.equal(compare(ordinary, (model,)), text) or name == "int8 subclass"  # eight bits are close


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_taken_apart_such_a_weight_gives_another_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    for module in (linear, stock, forward):
        monkeypatch.setattr(module, "is_dense", lambda weight: True)
    monkeypatch.setattr(linear, "few_row_form", lambda weight, weights, rows: linear.rows_last)
    with pytest.raises(AssertionError):
        compare(changed(family, "lying subclass"), ("ngram",))


def test_planned_calls_and_engines() -> None:
    model = changed("llama", "int8 subclass")
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)
    plain = model.generate(IDS[:1], attention_mask=MASK[:1], **options)
    for draft in ("ngram", [model]):
        text: Any = Speculator(model, draft).generate(IDS[:1], attention_mask=MASK[:1], **options)
        assert torch.equal(text, plain)
    with Engine(model, "ngram", num_pages=16) as engine:
        assert engine.submit(IDS[0].tolist(), **options).result().token_ids == plain[0, IDS.shape[1] :].tolist()


def test_fingerprints_read_the_numbers_inside() -> None:
    model, same = changed("llama", "int8 subclass"), changed("llama", "int8 subclass")
    assert fingerprint(model) == fingerprint(same)
    same.model.layers[1].mlp.down_proj.weight.codes[0] += 1
    assert fingerprint(model) != fingerprint(same)


def test_no_pass_records_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would keep every weight alive that was unpacked for the pass."""
    recorded = []
    plain = Eighths.__torch_function__.__func__  # type: ignore[attr-defined]

    def noting(cls: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.linear:
            recorded.append(torch.is_grad_enabled())
        return plain(cls, function, types, args, kwargs)

    monkeypatch.setattr(Eighths, "__torch_function__", classmethod(noting))
    model = changed("llama", "int8 subclass")
    Speculator(model, "ngram", k=2).generate(IDS[:1], attention_mask=MASK[:1], max_new_tokens=4, do_sample=False)
    assert recorded
    assert not any(recorded)


def torchao_int8(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quanto_int4(model: Any) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)


def bitsandbytes_nf4(model: Any) -> None:
    library = pytest.importorskip("bitsandbytes")
    for part in model.model.layers.modules():
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear:
                made = library.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                made.weight = library.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(part, name, made.to("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [torchao_int8, quanto_int4, bitsandbytes_nf4])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_real_libraries(quantise: Callable[[Any], None], family: str) -> None:
    model = base(family)
    quantise(model)
    compare(model, ("ngram", base(family)))
