"""llama.cpp as a peer: same prompts, same lengths, same text as plain generation, and a reason where it cannot run.

Most tests run without llama.cpp: `FakeLlama` keeps the interface of `llama_cpp.Llama` that the peer uses and computes
from the GGUF file by `GgufLlama`. The last ones run the real thing where llama-cpp-python is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from gguf_llama import TEXT, GgufLlama, merging_tokenizer, tiny_llama

from specdec.experiments.bench.llamacpp import llama_cpp as llama_cpp_way
from specdec.experiments.bench.llamacpp import llama_cpp_file, load
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.runner import run
from specdec.experiments.bench.ways import PLAIN, all_ways
from specdec.experiments.ways import select
from specdec.pairing.gguf import export_model
from specdec.shipped import DEFAULT_PAIR

OPTIONS = BenchOptions(num_prompts=2, prompt_tokens=12, new_tokens=10, threads=1, rounds=1, memory=False)
INSTALLED = importlib.util.find_spec("llama_cpp") is not None
real = pytest.mark.skipif(not INSTALLED, reason="needs llama-cpp-python: pip install 'specdec-lm[llamacpp]'")


class FakeLlama:
    """The part of `llama_cpp.Llama` that the peer uses; one pass a token."""

    made: list[FakeLlama] = []  # noqa: RUF012

    def __init__(self, model_path: str, **settings: Any) -> None:
        self.model = GgufLlama(Path(model_path))
        self.path, self.settings = Path(model_path), settings
        self.seeds: list[int] = []
        self.kept: list[int] = []
        self.made.append(self)

    def reset(self) -> None:
        self.kept = []

    def set_seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def eval(self, tokens: list[int]) -> None:
        self.kept += tokens

    def generate(self, tokens: list[int], **sampling: float) -> Iterator[int]:
        self.sampling = sampling
        while True:
            self.eval(tokens)
            assert len(self.kept) <= self.settings["n_ctx"]
            tokens = [int(self.model.logits(self.kept)[-1].argmax())]
            yield tokens[0]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLlama]:
    package: Any = ModuleType("llama_cpp")
    speculative: Any = ModuleType("llama_cpp.llama_speculative")
    package.Llama, package.GGML_TYPE_F32, package.GGML_TYPE_F16 = FakeLlama, 0, 1
    speculative.LlamaPromptLookupDecoding = lambda num_pred_tokens: ("lookup", num_pred_tokens)
    monkeypatch.setitem(sys.modules, "llama_cpp", package)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    monkeypatch.setattr(FakeLlama, "made", [])
    return FakeLlama


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for role, layers in (("target", 2), ("draft", 1)):
        tiny_llama(num_hidden_layers=layers).save_pretrained(folder / role)
        merging_tokenizer().save_pretrained(folder / role)
    return folder


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> BenchOptions:
    return replace(OPTIONS, pair=folder, out=tmp_path)


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    (path,) = out.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_names_and_families() -> None:
    assert {(way.family, way.name) for way in all_ways()} >= {
        ("llama-cpp-f32", "llama-cpp-f32"),
        ("llama-cpp-f32-lookup", "llama-cpp-f32-lookup-k10"),
        ("llama-cpp-f16", "llama-cpp-f16"),
    }
    lookups = [peer.name for peer in select(all_ways(), ("llama-cpp-f32-lookup",), PLAIN)]
    assert lookups == ["hf-plain", "llama-cpp-f32-lookup-k2", "llama-cpp-f32-lookup-k10"]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch": 2}, "use batch 1, not 2"),
        ({"device": "cuda"}, "CPU only, not on cuda"),
        ({"dtype": "bfloat16"}, "with float32, not with bfloat16"),
        ({"dtype": "float16"}, "with float32, not with float16"),
    ],
)
def test_refusals(options: BenchOptions, change: dict[str, Any], reason: str) -> None:
    assert llama_cpp_way("f32").refusal(options) is None
    assert reason in str(llama_cpp_way("f32").refusal(replace(options, **change)))
    assert llama_cpp_way("f16").refusal(replace(options, dtype="float16")) is None


@pytest.mark.usefixtures("fake")
def test_a_pair_that_gguf_cannot_hold_is_refused(options: BenchOptions, tiny_pair: Path) -> None:
    assert "has merges" in str(llama_cpp_way("f32").refusal(replace(options, pair=tiny_pair)))


def test_a_library_that_does_not_load_is_a_reason(options: BenchOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "llama_cpp":
                raise OSError("libllama.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert "libllama.so: cannot open" in str(llama_cpp_way("f32").refusal(options))


@pytest.mark.usefixtures("missing")
def test_without_it_a_run_goes_on_and_a_run_that_asked_says_why(
    options: BenchOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(replace(options, quick=True, peers=("hf-plain", "llama-cpp-f32"))) == 0
    assert "llama-cpp-f32: n/a (llama-cpp-python cannot be imported" in capsys.readouterr().out
    (summary,) = [entry for entry in records(options.out, "summary") if entry["peer"] != "hf-plain"]
    assert "pip install 'specdec-lm[llamacpp]'" in summary["skipped"]
    assert run(replace(options, quick=True, out=options.out / "all")) == 0
    assert "llama" not in capsys.readouterr().out


def test_a_run_measures_it_beside_the_others(
    options: BenchOptions, fake: type[FakeLlama], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(replace(options, peers=("llama-cpp-f32", "llama-cpp-f16-lookup-k2"))) == 0
    printed = capsys.readouterr().out
    runs = [run for run in records(options.out, "run") if run["peer"] == "llama-cpp-f32"]
    assert len(runs) == 2
    assert all(run["passes"] == run["tokens"] == options.new_tokens for run in runs)
    assert all(0 < run["target_seconds"] < run["seconds"] for run in runs)
    different = {entry["peer"] for entry in records(options.out, "difference")}
    assert "llama-cpp-f32" not in different
    assert "llama-cpp-f32 *" in printed
    plain, lookup = fake.made
    assert not plain.path.exists()  # a run leaves no model behind
    assert (plain.settings["type_k"], plain.settings["type_v"]) == (0, 0)
    assert (lookup.settings["type_k"], lookup.settings["type_v"]) == (1, 1)
    assert (plain.settings["draft_model"], lookup.settings["draft_model"]) == (None, ("lookup", 2))
    assert plain.settings["n_threads"] == plain.settings["n_threads_batch"] == 1
    assert (plain.settings["n_ctx"], lookup.settings["n_ctx"]) == (22, 24)
    assert plain.seeds == [0, 0, 1]  # warm-up, then one per prompt
    assert plain.sampling == {"temp": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


def test_the_file_that_the_target_is_in_is_measured_as_it_is(
    options: BenchOptions, fake: type[FakeLlama], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the target is in no GGUF file" in str(llama_cpp_file().refusal(options))
    own = export_model(tiny_llama(), merging_tokenizer(), tmp_path / "own.gguf")
    asked = replace(options, pair=DEFAULT_PAIR, target=str(own), peers=("llama-cpp-file", "llama-cpp-f32"))
    monkeypatch.setattr("specdec.experiments.bench.llamacpp.has_feature", lambda name: name == "amx_int8")
    assert run(asked) == 0
    assert records(options.out, "difference") == []
    widened, as_it_is = fake.made
    assert (as_it_is.path, widened.path == own) == (own, False)
    assert (as_it_is.settings["type_k"], widened.settings["type_k"]) == (1, 0)
    assert (as_it_is.settings["n_ubatch"], widened.settings["n_ubatch"]) == (1, 512)  # AMX: not where it crashes
    assert own.exists()


@pytest.mark.usefixtures("fake")
def test_a_wrong_text_is_noticed(options: BenchOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GgufLlama.logits
    monkeypatch.setattr(GgufLlama, "logits", lambda self, ids: -honest(self, ids))
    assert run(replace(options, peers=("llama-cpp-f32",))) == 0  # not specdec's fault, but told
    found = records(options.out, "difference")
    assert [(entry["peer"], entry["position"], entry["near_tie"]) for entry in found] == [
        ("llama-cpp-f32", 0, False),
        ("llama-cpp-f32", 0, False),
    ]


@real
@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"head_dim": 12}])
def test_llama_cpp_computes_the_models_logits(shape: dict[str, Any], options: BenchOptions, tmp_path: Path) -> None:
    import llama_cpp

    model = tiny_llama(**shape)
    path = export_model(model, merging_tokenizer(), tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False)
    ids = list(range(5, 60, 3))
    llama.eval(ids)
    with torch.no_grad():
        wanted = model(torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(torch.tensor(llama.scores[: len(ids)]), wanted, rtol=1e-3, atol=1e-3)


@real
def test_llama_cpp_splits_texts_as_the_tokenizer(options: BenchOptions, tmp_path: Path) -> None:
    tokenizer = merging_tokenizer()
    llama = load(export_model(tiny_llama(), tokenizer, tmp_path / "m.gguf"), "f32", 0, options)
    for text in (TEXT, "  x  \n\n\t y12 don't  ", "naïve — ünïcode 漢字 🙂"):
        assert llama.tokenize(text.encode(), add_bos=False) == tokenizer(text)["input_ids"]


@real
@pytest.mark.parametrize("lookup", [0, 2, 10])
def test_llama_cpp_writes_plain_generations_text(lookup: int, options: BenchOptions) -> None:
    peer = llama_cpp_way("f32", lookup)
    assert run(replace(options, peers=(peer.name,))) == 0
    assert all(entry["near_tie"] for entry in records(options.out, "difference"))


@real
def test_llama_cpp_samples_by_the_seed(options: BenchOptions) -> None:
    sampling = replace(options, temperature=1.0)
    generate = llama_cpp_way("f32").ready(sampling.load(), sampling)
    ids = torch.arange(5, 17)[None]
    texts = [generate(ids, seed).ids.tolist() for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
