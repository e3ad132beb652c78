"""A class nobody has tested is held against its own plain `generate` before it is used: quirks are refused by name."""

from __future__ import annotations

from functools import wraps
from typing import Any

import models
import pytest
import torch
import transformers as tf
from families import small_model
from torch import Tensor

from specdec import Engine, Speculator, UnsupportedModelError
from specdec.kv.families import is_tested
from specdec.verify import selfcheck

Llama: Any = tf.LlamaForCausalLM
GPT2: Any = tf.GPT2LMHeadModel

as_llama = wraps(tf.LlamaForCausalLM.forward)
"""Its signature says what a forward takes."""


class Ordinary(Llama):
    """A class that is not of `transformers.models`, and that does nothing else than its parent."""


class BySlot(Llama):
    """Places tokens by cache slot, whatever positions are asked for."""

    @as_llama
    def forward(self, input_ids: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        if position_ids is not None:
            first = position_ids[:, :1]
            position_ids = first + torch.arange(position_ids.shape[1])
        return super().forward(input_ids=input_ids, position_ids=position_ids, **rest)


class ByColumn(GPT2):
    """Plain generation counts (learned) positions through the padding."""

    @wraps(tf.GPT2LMHeadModel.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **rest: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **rest)
        width = inputs["input_ids"].shape[1]
        inputs["position_ids"] = torch.arange(input_ids.shape[1] - width, input_ids.shape[1]).expand(len(input_ids), -1)
        return inputs


class Mixing(Llama):
    """Adds to the logits their mean over the rows, or the tokens, of a pass."""

    over: tuple[int, ...] = (0, 1)

    @as_llama
    def forward(self, *args: Any, **rest: Any) -> Any:
        out = super().forward(*args, **rest)
        out.logits = out.logits + 0.3 * out.logits.mean(self.over, keepdim=True)
        return out


class MixingRows(Mixing):
    over = (0,)


class MixingNodes(Mixing):
    over = (1,)


class Remembering(Llama):
    """Keeps something beside K/V from pass to pass."""

    @as_llama
    def forward(self, *args: Any, **rest: Any) -> Any:
        out = super().forward(*args, **rest)
        last = self.__dict__.get("last")
        self.__dict__["last"] = out.logits[:, -1:].detach()
        if last is not None and last.shape[0] == out.logits.shape[0]:
            out.logits = out.logits + 0.3 * last
        return out


class Failing(Llama):
    """Has no way with trees."""

    @as_llama
    def forward(self, *args: Any, attention_mask: Any = None, **rest: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("expected a mask of two dimensions")
        return super().forward(*args, attention_mask=attention_mask, **rest)


class Speaking(Llama):
    """Its own `generate` makes something else than text."""

    def generate(self, input_ids: Tensor, max_new_tokens: int = 3, **rest: Any) -> Any:
        return torch.zeros(len(input_ids), max_new_tokens, 2)


QUIRKS: dict[Any, str] = {
    BySlot: "in a draft tree",
    ByColumn: "1 tokens after the prompt",
    MixingRows: "in a draft tree",
    MixingNodes: "in a draft tree",
    Remembering: "in a draft tree",
    Failing: "ValueError: expected a mask of two dimensions",
    Speaking: "as text",
}


def model_of(kind: Any, dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    if issubclass(kind, tf.GPT2LMHeadModel):
        return models.build(kind, models.BUILDERS["gpt2"]()[1], dtype, 3, "sdpa")
    config = tf.LlamaConfig(
        **{
            **dict(vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
            **dict(num_key_value_heads=2, initializer_range=0.3, pad_token_id=0),
            **sizes,
        }
    )
    return models.build(kind, config, dtype, 3, "sdpa")


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_trusted", set())


@pytest.mark.parametrize("kind", list(QUIRKS), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_quirks_are_refused_by_name(kind: type, dtype: str) -> None:
    model = model_of(kind, models.DTYPES[dtype])
    with pytest.raises(UnsupportedModelError, match=QUIRKS[kind]) as caught:
        Speculator(model, "ngram")
    assert str(caught.value).startswith(f"target: {kind.__name__} ")
    with pytest.raises(UnsupportedModelError, match=kind.__name__):
        Engine(model, "ngram", num_pages=8)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("sizes", [{}, {"num_hidden_layers": 5, "num_key_value_heads": 1}], ids=["two", "five"])
def test_an_ordinary_model_passes(dtype: str, sizes: dict[str, Any]) -> None:
    """Negative control."""
    Speculator(model_of(Ordinary, models.DTYPES[dtype], **sizes), "ngram")


def passes_of(model: Any) -> list[int]:
    count = [0]

    def ran(*args: object) -> None:
        count[0] += 1

    model.model.layers[0].register_forward_hook(ran)
    return count


SHAPES: tuple[dict[str, Any], ...] = ({}, {}, {"hidden_act": "gelu"})


def test_once_for_a_class_and_configuration() -> None:
    first, same, other = (model_of(Ordinary, **sizes) for sizes in SHAPES)
    counts = [passes_of(model) for model in (first, same, other)]
    for model in (first, first, same, other):
        Speculator(model, None)
    assert 0 < counts[0][0] <= 12
    assert counts[1] == [0]
    assert counts[2] == counts[0]


def test_a_refused_class_is_refused_again() -> None:
    model = model_of(BySlot)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError):
            Speculator(model, None)


def test_tested_classes_run_nothing() -> None:
    model = model_of(tf.LlamaForCausalLM)
    count = passes_of(model)
    Speculator(model, "ngram")
    assert count == [0]


@pytest.mark.parametrize("kind", [Ordinary, BySlot, Failing])
def test_it_leaves_no_trace(kind: type) -> None:
    model = model_of(kind)
    model.train()
    model.model.layers[1].eval()
    flags = {name: part.training for name, part in model.named_modules()}
    fields, state = sorted(model.__dict__), torch.get_rng_state()
    config = model.config._attn_implementation, model.generation_config.to_dict()
    try:
        selfcheck.check_text(model, "target")
        refused = False
    except UnsupportedModelError:
        refused = True
    assert refused == (kind is not Ordinary)
    assert {name: part.training for name, part in model.named_modules()} == flags
    assert sorted(model.__dict__) == fields
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config._attn_implementation, model.generation_config.to_dict()) == config
    assert not any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in model.modules()
    )


def test_dropout_in_training_mode_is_no_quirk() -> None:
    model = model_of(Ordinary, attention_dropout=0.5)
    selfcheck.check_text(model.train(), "target")


@pytest.mark.parametrize("kind", [Ordinary, BySlot])
def test_offloaded_weights(kind: type) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(model_of(kind, torch.float32), execution_device="cpu")
    assert next(model.parameters()).is_meta
    if kind is BySlot:
        with pytest.raises(UnsupportedModelError, match="BySlot is none of the classes"):
            selfcheck.check_text(model, "target")
    else:
        selfcheck.check_text(model, "target")


def test_generation_defaults_of_the_model_do_not_matter() -> None:
    model = model_of(Ordinary)
    model.generation_config.update(eos_token_id=list(range(2, 20)), do_sample=True, repetition_penalty=3.0)
    selfcheck.check_text(model, "target")


def test_a_tested_class_made_to_attend_both_ways_is_tried() -> None:
    bert = tf.BertConfig(
        vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    for both_ways in (True, False):
        bert.is_decoder = not both_ways
        model = models.build(tf.BertLMHeadModel, bert, torch.float64, 3, "sdpa")
        assert is_tested(model) != both_ways
        if both_ways:
            with pytest.raises(UnsupportedModelError, match="BertLMHeadModel"):
                Speculator(model, "ngram")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        Speculator(model_of(tf.LlamaForCausalLM, is_causal=False), "ngram")
    gemma = models.BUILDERS["gemma3"]()[1]
    gemma.use_bidirectional_attention = True
    embedding = models.build(tf.Gemma3ForCausalLM, gemma, torch.float64, 3, "sdpa")
    with pytest.raises(UnsupportedModelError, match="Gemma3ForCausalLM"):
        Speculator(embedding, "ngram")


@pytest.mark.parametrize(
    "name", ["XGLMForCausalLM", "Qwen3MoeForCausalLM", "CTRLLMHeadModel", "LlavaForConditionalGeneration"]
)
def test_classes_of_transformers(name: str) -> None:
    model = small_model(name)
    model.to(torch.float32)
    if name == "XGLMForCausalLM":  # its attention takes no mask that rows share
        with pytest.raises(UnsupportedModelError, match="no attention mask that the rows of a batch share"):
            Speculator(model, "ngram")
        return
    ids, mask = models.prompts((7, 4, 6), 60, 5, 3)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    found: Any = Speculator(model, "ngram", k=3).generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, plain)
