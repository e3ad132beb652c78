"""The packages of docs/recipes.md, beyond what its examples show. Each test is skipped without its package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from source_files import ROOT

import specdec

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages: each calls what another deprecates
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


def pair() -> tuple[Any, Any, Any]:
    return specdec.load_pair("stdlib-python", device="cpu")


def test_an_int8_target_of_torchao_is_its_own_text_by_every_drafter() -> None:
    config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
    from transformers import AutoModelForCausalLM, TorchAoConfig

    target, draft, tokenizer = pair()
    kind: Any = TorchAoConfig
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        target.config._name_or_path, dtype=target.dtype, quantization_config=kind(config)
    )
    ids = tokenizer("def main(argv):", return_tensors="pt")["input_ids"]
    plain = quantised.generate(ids, **GREEDY)
    sampled = []
    for drafter, k in ((None, None), ("ngram", 3), (draft, 5)):
        spec = specdec.Speculator(quantised, drafter, k=k, rule="coupled")
        assert torch.equal(torch.as_tensor(spec.generate(ids, **GREEDY)), plain)
        sampled.append(torch.as_tensor(spec.generate(ids, max_new_tokens=24, do_sample=True, seed=3)))
    assert all(torch.equal(one, sampled[0]) for one in sampled)


@pytest.mark.parametrize("rows", [1, 3])
def test_lm_eval_in_batches(rows: int, tmp_path: Path) -> None:
    """Its stop rule keeps a state for all rows."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    target, draft, tokenizer = pair()
    starts = ["def read(path):\n", "class Stack:\n", "import os\n\n\ndef size(path):\n"]
    data = tmp_path / "starts.json"
    data.write_text(json.dumps([{"start": start} for start in starts]))
    task = {
        "task": "code", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{start}}", "doc_to_target": "return",
        "generation_kwargs": {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    model, manager = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=rows), TaskManager(include_defaults=False)

    def answers() -> list[Any]:
        found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
        return [found["results"], [sample["resps"] for sample in found["samples"]["code"]]]

    plain = answers()
    with specdec.patch(target, draft) as spec:
        assert answers() == plain
        assert spec.report is not None


def test_trl_leaves_a_model_that_is_still_fast_and_its_last_weights_count() -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from specdec.verify.passes.choose import runs_natively

    target, draft, tokenizer = pair()
    config = GRPOConfig(
        "unused", max_steps=2, num_generations=4, per_device_train_batch_size=4, max_completion_length=12,
        learning_rate=1e-2, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        target,
        lambda completions, **_: [float(len(text)) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["def read(path):\n", "class Node:\n"]}),
        processing_class=tokenizer,
    )
    natively = runs_natively(target)
    ids = tokenizer("def main(argv):", return_tensors="pt")["input_ids"]
    before = target.generate(ids, **GREEDY)
    with specdec.patch(trainer.model, draft, rule="coupled") as spec:
        rollout, seen = trainer.model.generate, []

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append((trainer.model.training, runs_natively(trainer.model)))
            return rollout(*args, **kwargs)

        trainer.model.generate = watched
        trainer.train()
        assert seen == [(True, natively)] * 2
        assert spec.report is not None
        assert not spec.report.notes
    trainer.model.eval()
    after = trainer.model.generate(ids, **GREEDY)
    assert not torch.equal(after, before)
    assert torch.equal(torch.as_tensor(spec.generate(ids, **GREEDY)), after)


def plugin() -> Any:
    pytest.importorskip("llm")
    found = importlib.util.spec_from_file_location("llm_plugin", ROOT / "examples" / "llm_plugin.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_llm_streams_remembers_and_reports_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    module = plugin()
    model = module.Speculating()
    spec = module.load(None)
    talk = model.conversation()
    first = talk.prompt("def read(path):", max_new_tokens=16)
    assert len(list(first)) > 1
    second = talk.prompt("def write(path):", max_new_tokens=16)
    told = "\n".join(["def read(path):", first.text(), "def write(path):"])
    ids = spec.tokenizer(told, return_tensors="pt")["input_ids"].to(spec.target.device)
    out = spec.target.generate(ids, max_new_tokens=16)
    assert second.text() == spec.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def fails(*_: Any, **__: Any) -> Any:
        raise LookupError("no such luck")

    monkeypatch.setattr(spec, "generate", fails)
    with pytest.raises(LookupError, match="no such luck"):
        model.prompt("x").text()
