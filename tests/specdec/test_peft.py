"""peft's own wrappers: the text is what their `generate` gives, or they are refused by name."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch

import specdec
from specdec import UnsupportedModelError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own: it calls what transformers deprecates

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}
TASK = "CAUSAL_LM"
Speculator: Any = specdec.Speculator
patch: Any = specdec.patch


def fresh(family: str = "llama-gqa", dtype: str = "fp32") -> Any:
    return copy.deepcopy(models.target(family, dtype))


def adapted(config: Any, family: str = "llama-gqa", dtype: str = "fp32", **options: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(fresh(family, dtype), config, **options).eval()


def lora(*modules: str, **options: Any) -> Any:
    return peft.LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False, **{"task_type": TASK, **options})


CONFIGS: dict[str, Any] = {
    "lora": lambda: lora("q_proj", "v_proj"),
    "no task": lambda: lora("o_proj", task_type=None),
    "embeddings": lambda: lora("embed_tokens", "k_proj"),
    "saved modules": lambda: lora("q_proj", modules_to_save=["lm_head"]),
    "ia3": lambda: peft.IA3Config(
        task_type=TASK,
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "norms": lambda: peft.LNTuningConfig(task_type=TASK, target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_text_is_the_wrappers(name: str, family: str) -> None:
    held = adapted(CONFIGS[name](), family)
    plain = held.generate(input_ids=IDS, **GREEDY)
    spec = Speculator(held, "ngram", k=3)
    assert torch.equal(spec.generate(IDS, **GREEDY), plain)
    assert torch.equal(held.generate(input_ids=IDS, custom_generate=spec, **GREEDY), plain)
    bare: Any = models.target(family, "fp32")
    drafted = Speculator(bare, held, k=3)
    assert torch.equal(drafted.generate(IDS, **GREEDY), bare.generate(IDS, **GREEDY))
    assert drafted.report is not None
    assert drafted.report.num_drafter_faults == 0


def test_adapters_switched_merged_and_taken_out_are_followed() -> None:
    held = adapted(lora("q_proj", "v_proj"))
    held.add_adapter("other", lora("k_proj", "up_proj"))
    spec = Speculator(held, "ngram", k=3)
    texts = []

    def compare() -> None:
        texts.append(held.generate(input_ids=IDS, **GREEDY))
        assert torch.equal(spec.generate(IDS, **GREEDY), texts[-1])

    compare()
    with held.disable_adapter():
        compare()
    held.set_adapter("other")
    compare()
    assert len({str(text.tolist()) for text in texts}) == 3
    held.merge_adapter()
    compare()
    held.unmerge_adapter()
    bare = held.merge_and_unload()
    assert torch.equal(spec.generate(IDS, **GREEDY), bare.generate(IDS, **GREEDY))


def test_an_adapter_that_transformers_put_in() -> None:
    inside = fresh()
    try:
        inside.add_adapter(lora("q_proj"))
    except ValueError as error:
        pytest.skip(str(error))  # each version of transformers asks for a newer peft
    inside.eval()
    assert torch.equal(Speculator(inside, "ngram", k=3).generate(IDS, **GREEDY), inside.generate(IDS, **GREEDY))


def test_a_mixed_model_and_a_compiled_one() -> None:
    mixed = adapted(lora("q_proj"), mixed=True)
    assert torch.equal(Speculator(mixed, "ngram", k=3).generate(IDS, **GREEDY), mixed.generate(IDS, **GREEDY))
    held = adapted(lora("q_proj"))
    spec = Speculator(torch.compile(held, backend="eager"), "ngram", k=3)
    assert torch.equal(spec.generate(IDS, **GREEDY), held.generate(input_ids=IDS, **GREEDY))


def test_patch_and_the_wrappers_own_generation_config() -> None:
    held = adapted(lora("q_proj"))
    plain = held.generate(input_ids=IDS, **GREEDY)
    with patch(held, "ngram", k=3) as spec:
        assert torch.equal(held.generate(IDS, **GREEDY), plain)
        assert spec.report is not None
    assert torch.equal(held.generate(input_ids=IDS, **GREEDY), plain)
    held.generation_config = copy.deepcopy(held.generation_config)
    held.generation_config.max_new_tokens, held.generation_config.do_sample = 3, False
    assert torch.equal(spec.generate(IDS), held.generate(input_ids=IDS))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("PROMPT_TUNING", lambda: peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=3)),
        ("PREFIX_TUNING", lambda: peft.PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3)),
        ("ADAPTION_PROMPT", lambda: peft.AdaptionPromptConfig(task_type=TASK, adapter_len=3, adapter_layers=1)),
        ("activated LoRA", lambda: lora("q_proj", alora_invocation_tokens=[7])),
    ],
    ids=["prompt", "prefix", "adaption", "activated"],
)
def test_what_needs_its_wrapper_is_refused_by_name(kind: str, make: Any) -> None:
    held = adapted(make())
    for build in (lambda: Speculator(held, "ngram"), lambda: Speculator(fresh(), held, k=2)):
        with pytest.raises(UnsupportedModelError, match=kind):
            build()
