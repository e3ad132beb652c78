"""`Speculator.from_pair`: the pair's models, with the pair's settings, and one clear error for what goes wrong."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from other_tokenizers import longer_tokenizer, reversed_tokenizer
from tiny_pair import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import specdec
from specdec.pairing import Pair, find_pair
from specdec.pairing.create import new_pair
from specdec.pairing.loading import check_vocabularies, load_model, pair_dtype, shared_ids
from specdec.pairing.registry import pair_text
from specdec.pairing.schema import Draft, Drafting

PROMPT = "def parse(argv):\n    "
CPU = torch.device("cpu")


@pytest.fixture
def pair_file(tiny_pair: Path, tmp_path: Path) -> Path:
    pair = new_pair(str(tiny_pair / "target"), str(tiny_pair / "draft"), "tiny", folder=tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(pair_text(pair))
    return path


def texts(spec: specdec.Speculator) -> list[int]:
    inputs = spec.tokenizer(PROMPT, return_tensors="pt")
    return spec.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()


def test_a_draft_given_by_name_is_loaded_with_the_same_errors(tiny_pair: Path, tmp_path: Path) -> None:
    target: Any = AutoModelForCausalLM.from_pretrained(tiny_pair / "target", dtype=torch.float32)
    assert specdec.Speculator(target, tiny_pair / "draft").drafter is not None
    for name, said in (("no-one/no-model", "run `hf download no-one/no-model`"), (tmp_path, "no config.json in it")):
        with pytest.raises(specdec.SpecdecError, match=f"draft: could not load .*{said}"):
            specdec.Speculator(target, name)


@pytest.fixture(scope="module")
def plain(tiny_pair: Path) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair / "target", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_pair / "target")
    return model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)[0].tolist()


@pytest.mark.parametrize("form", ["file", "folder", "object"])
def test_a_pair_generates_what_its_target_does(pair_file: Path, tiny_pair: Path, plain: list[int], form: str) -> None:
    given: Any = {"file": pair_file, "folder": str(tiny_pair), "object": find_pair(pair_file)}[form]
    spec = specdec.Speculator.from_pair(given, k=3)
    assert texts(spec) == plain
    assert spec.report is not None
    assert spec.report.drafter == "model"
    assert spec.report.num_accepted_tokens > 0


def test_an_ngram_pair(tiny_pair: Path, plain: list[int]) -> None:
    pair = replace(find_pair(tiny_pair), draft=Draft("ngram"))
    spec = specdec.Speculator.from_pair(pair)
    assert texts(spec) == plain
    assert spec.report is not None
    assert spec.report.drafter == "ngram"


def test_the_pairs_settings_are_used_and_options_replace_them(pair_file: Path) -> None:
    pair = replace(find_pair(pair_file), drafting=Drafting(tree=(2, 2), rule="traversal"))

    def drafted(**options: Any) -> tuple[int, str]:
        spec = specdec.Speculator.from_pair(pair, **options)
        assert spec.drafter is not None
        return spec.drafter.max_nodes, spec.rule

    assert drafted() == (6, "traversal")
    assert drafted(k=3, rule="block") == (3, "block")
    assert drafted(tree=(3,)) == (3, "traversal")
    with pytest.raises(specdec.UnsupportedArgumentError, match="Pass lossy=True"):
        specdec.Speculator.from_pair(replace(pair, drafting=Drafting(k=2, rule="typical")))


def test_the_shipped_pair_is_one_of_them() -> None:
    spec = specdec.Speculator.from_pair("stdlib-python", k=4)
    texts(spec)
    assert spec.report is not None
    assert spec.report.mean_acceptance_length > 1.5


def test_dtype_and_device(pair_file: Path) -> None:
    pair = find_pair(pair_file)
    assert pair_dtype(pair, CPU) == torch.float32
    assert pair_dtype(pair, torch.device("cuda")) == torch.bfloat16
    assert pair_dtype(replace(pair, dtype="auto"), torch.device("cuda")) == "auto"
    assert specdec.Speculator.from_pair(pair).target.dtype == torch.float32
    spec = specdec.Speculator.from_pair(pair, dtype=torch.float64, device="cpu")
    assert spec.target.dtype == torch.float64


# --- one error for each thing that goes wrong -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("llama-3.1-8b", "got 'llama-3.1-8b'; did you mean llama-3.1-8b-1b"),
        ("llama-3.1-8b-eagle3", "does not run eagle3 heads .* use llama-3.1-8b-1b or llama-3.1-8b-ngram, or an engine"),
        ("gemma-2-9b-vicuna-68m", "mismatched vocabularies: specdec needs one tokenizer for both models"),
    ],
)
def test_pairs_that_cannot_run_say_what_to_do_instead(pair: str, said: str) -> None:
    with pytest.raises(specdec.UnsupportedArgumentError, match=said):
        specdec.Speculator.from_pair(pair)


def test_a_bad_file_and_a_bad_object(tmp_path: Path, pair_file: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(pair_file.read_text().replace('kind = "model"', 'kind = "models"'))
    with pytest.raises(specdec.UnsupportedArgumentError, match=r"\[draft\] kind: expected one of model, ngram"):
        specdec.Speculator.from_pair(bad)
    wrong = replace(find_pair(pair_file), drafting=Drafting(k=2, tree=(2,)))
    with pytest.raises(specdec.UnsupportedArgumentError, match="expected k or tree, got both"):
        specdec.Speculator.from_pair(wrong)


def test_offline_without_the_model() -> None:
    with pytest.raises(specdec.SpecdecError, match=r"target: could not .* 'HuggingFaceTB/SmolLM2-1.7B-Instruct': it is"
                       r" not on this machine and the hub cannot be reached .*: run `hf download Hugging"):  # fmt: skip
        specdec.Speculator.from_pair("smollm2-1.7b-135m")


def test_a_draft_that_is_missing_offline(tiny_pair: Path) -> None:
    pair = replace(find_pair(tiny_pair), draft=Draft("model", model="owner/absent"))
    with pytest.raises(specdec.SpecdecError, match=r"draft: could not .* 'owner/absent': it is not on this machine"):
        specdec.Speculator.from_pair(pair)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (hub.GatedRepoError, "accounts that accepted its licence: do that on its page, then `hf auth login`"),
        (hub.RevisionNotFoundError, "the hub has no such revision of it: check `revision`"),
        (hub.RepositoryNotFoundError, "the hub has no such model, or it is private: check the name"),
    ],
)
def test_what_the_hub_refuses(kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers wraps the hub's errors in an OSError of its own."""

    def refused(name: str, **arguments: Any) -> None:
        assert arguments["revision"] == "v2"
        response = SimpleNamespace(headers={}, request=None)
        try:
            raise kind("long text of the hub", response=response)  # type: ignore[call-arg]
        except Exception as error:
            raise OSError("several\nlines\nof advice") from error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused)
    with pytest.raises(specdec.SpecdecError) as error:
        load_model("target", "owner/name", torch.float32, CPU, "v2")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_in_another_format_are_refused(tiny_pair: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair / "target", tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp_path / "x" / "pytorch_model.bin")
    with pytest.raises(
        specdec.SpecdecError, match=r"target: could not load a causal language model from .*safetensors"
    ):
        load_model("target", str(tmp_path / "x"), torch.float32, CPU)


def with_tokenizer(tiny_pair: Path, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Pair:
    shutil.copytree(tiny_pair, folder)
    tokenizer.save_pretrained(folder / "draft")
    return find_pair(folder)


def test_mismatched_vocabularies_are_refused(tiny_pair: Path, tmp_path: Path) -> None:
    mismatched = with_tokenizer(tiny_pair, tmp_path / "mismatched", reversed_tokenizer())
    with pytest.raises(
        specdec.UnsupportedArgumentError, match=r"mismatched vocabularies: target and draft agree on 0%"
    ):
        specdec.Speculator.from_pair(mismatched)
    longer = with_tokenizer(tiny_pair, tmp_path / "longer", longer_tokenizer())
    check_vocabularies(longer, byte_tokenizer())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "longer" / "draft" / name).unlink()
    check_vocabularies(longer, byte_tokenizer())  # a draft saved without a tokenizer is trusted


def test_shared_ids() -> None:
    assert shared_ids({"a": 0, "b": 1}, {"a": 0, "b": 1}) == 1
    assert shared_ids({"a": 0, "b": 1}, {"a": 1, "b": 0}) == 0
    assert shared_ids({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2, "d": 3}) == 0.5
