"""The benchmark: does it measure what it says, and does it notice when an output is wrong?"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.experiments.bench.equality import differences
from specdec.experiments.bench.measure import ModelClock, Run, measure
from specdec.experiments.bench.memory import _reset_peak, _status, measure_memory
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.runner import run
from specdec.experiments.bench.stats import summarise
from specdec.experiments.bench.ways import PLAIN, all_ways, hf_assisted, hf_plain, specdec_model
from specdec.experiments.pair import Models
from specdec.experiments.ways import Output, select
from specdec.provenance import provenance

VOCAB = 256
OPTIONS = BenchOptions(
    num_prompts=2, prompt_tokens=12, new_tokens=10, threads=1, rounds=1, memory=False, dtype="float64"
)


def make_pair(folder: Path) -> Path:
    """A random target, a noisy copy as draft, and a tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=3,  # a run must not stop at it
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "target")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    model.save_pretrained(folder / "draft")
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder / "target")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def pair(folder: Path) -> Models:
    return replace(OPTIONS, pair=folder).load()


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    (path,) = out.glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def run_of(peer: str, prompt: int, round_: int, seconds: float, rows: int = 1) -> Run:
    return Run(peer, prompt, round_, seconds, rows, rows * 10, 10, 0.5 * seconds, 0.0, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_prompts": 0}, "num_prompts >= 1"),
        ({"new_tokens": 1}, "new_tokens >= 2"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"dtype": "int8"}, "dtype"),
        ({"k": (4, 0)}, "lengths of drafts, at least 1"),
        ({"num_prompts": 5, "batch": 4}, "num_prompts=8"),
    ],
)
def test_options_refuse_with_the_fix(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchOptions(**wrong)


def test_unknown_pair_and_peer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder with target/ and draft/"):
        BenchOptions(pair=tmp_path).chosen_pair()
    with pytest.raises(ValueError, match="does not run eagle3 heads as drafters yet; use "):
        BenchOptions(pair="llama-3.1-8b-eagle3").chosen_pair()
    with pytest.raises(ValueError, match="unknown hf-asisted"):
        select(all_ways(), ("hf-asisted",))


def test_selection_keeps_the_reference() -> None:
    names = [peer.name for peer in select(all_ways(), ("specdec-model", "hf-assisted-k3"), PLAIN)]
    assert names == ["hf-plain", "hf-assisted-k3", *(f"specdec-model-k{k}" for k in (2, 3, 4, 5, 8))]
    names = [peer.name for peer in select(all_ways(lengths=(6,)), ("specdec-model", "specdec-ngram"), PLAIN)]
    assert names == ["hf-plain", "specdec-model-k6", "specdec-ngram-k6-b1", "specdec-ngram-k6-b2"]
    names = [peer.name for peer in select(all_ways(), ("specdec-planned",), PLAIN)]
    planned = ("model", "model+ngram", "ngram", "self:int8", "self:int8+ngram")
    assert names == ["hf-plain", *(f"specdec-planned-{drafts}" for drafts in planned)]


def test_help_needs_no_torch() -> None:
    code = "import sys, specdec.experiments.bench.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=_environment()).returncode == 0


@pytest.mark.parametrize("k", [2, 5])
def test_assisted_drafts_exactly_k(folder: Path, pair: Models, k: int) -> None:
    """transformers takes k from the assistant's own config only; a benchmark of its default 20 would flatter us."""
    draft = ModelClock()
    perfect = replace(pair, draft_model=replace(OPTIONS, pair=folder).load().target)
    generate = hf_assisted(k).ready(perfect, replace(OPTIONS, new_tokens=2 * (k + 1)))
    target = ModelClock()
    with draft.on(perfect.draft), target.on(perfect.target):
        generate(torch.randint(0, VOCAB, (1, 12)), 0)
    assert target.passes == 2  # every token of a perfect draft is kept: k + 1 tokens a pass
    assert draft.passes in (2 * k, 2 * k - 1)  # transformers drafts one fewer before the length limit


def test_order_rotates_and_every_pair_of_sides_meets(pair: Models) -> None:
    batches = [torch.randint(0, VOCAB, (1, 12)) for _ in range(3)]
    seen: list[str] = []
    peers = [hf_plain(), hf_assisted(2), specdec_model(2)]
    runs, found = measure(pair, peers, batches, replace(OPTIONS, rounds=2), seen.append)
    assert found == []
    calls = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert [call[0] for call in calls[1:]] == 2 * ["hf-plain", "hf-assisted-k2", "specdec-model-k2"]
    assert all(sorted(call) == sorted(calls[0]) for call in calls)
    assert sorted((run.prompt, run.round) for run in runs if run.peer == "hf-plain") == [
        (prompt, round_) for prompt in range(3) for round_ in range(2)
    ]
    plain = [run for run in runs if run.peer == "hf-plain"]
    assert {run.passes for run in plain} == {OPTIONS.new_tokens}
    assert all(0 < run.target_seconds < run.seconds and run.draft_seconds == 0 for run in plain)
    model = [run for run in runs if run.peer == "specdec-model-k2"]
    assert all(run.target_seconds + run.draft_seconds < run.seconds for run in model)
    assert all(run.report is not None and run.passes == run.report["num_steps"] for run in model)


def test_ratios_survive_a_machine_that_slows_down() -> None:
    """Ten times slower in the second round for everyone: ratios stay, per prompt, and HF's best k is found."""
    seconds = {"hf-plain": 2.0, "hf-assisted-k2": 1.6, "hf-assisted-k3": 1.0, "specdec-model-k4": 0.5}
    runs = [
        run_of(peer, prompt, round_, base * (1, 10)[round_] * (1 + prompt))
        for round_ in range(2)
        for prompt in range(3)
        for peer, base in seconds.items()
    ]
    peers = [hf_plain(), hf_assisted(2), hf_assisted(3), specdec_model(4)]
    plain, k2, k3, ours = summarise(peers, runs, [], {})
    assert plain.speedup is not None
    assert tuple(plain.speedup) == (1, 1, 1)
    assert (k2.best, k3.best) == (False, True)
    assert ours.speedup is not None
    assert ours.speedup_assisted is not None
    assert ours.speedup == pytest.approx((4, 4, 4))
    assert ours.speedup_assisted == pytest.approx((2, 2, 2))
    assert ours.ms_outside == pytest.approx(ours.ms_target)


def test_tokens_per_pass_counts_one_row() -> None:
    runs = [run_of("hf-plain", 0, 0, 1.0, rows=4)]
    (plain,) = summarise([hf_plain()], runs, [], {})
    assert plain.tokens_per_pass == 1.0


def test_a_wrong_token_is_no_tie_and_a_tie_is_one(pair: Models) -> None:
    ids = torch.randint(0, VOCAB, (1, 12))
    plain = hf_plain().ready(pair, OPTIONS)(ids, 0)
    wrong = plain.ids.clone()
    wrong[0, 12 + 4] = (wrong[0, 12 + 4] + 1) % VOCAB
    (found,) = differences(pair.target, {"hf-plain": plain, "specdec": Output(wrong, None)}, "hf-plain", 7, 12)
    assert (found.peer, found.prompt, found.row, found.position) == ("specdec", 7, 0, 4)
    assert not found.near_tie
    assert found.gap > 0
    with torch.no_grad():  # now the two tokens have the same logit everywhere
        head = pair.target.lm_head.weight
        head[found.peer_token] = head[found.plain_token]
    (found,) = differences(pair.target, {"hf-plain": plain, "specdec": Output(wrong, None)}, "hf-plain", 7, 12)
    assert found.near_tie


def test_run_writes_everything(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(replace(OPTIONS, pair=folder, out=tmp_path, quick=True)) == 0
    printed = capsys.readouterr().out
    assert "Every greedy output is equal to HF plain's" in printed
    assert "specdec-model-k4" in printed
    (source,) = records(tmp_path, "provenance")
    assert {"command", "git_commit", "versions", "cpu", "threads", "seed", "date"} <= source.keys()
    assert source["threads"] == 1
    assert len(records(tmp_path, "run")) == 6 * 2
    summaries = {summary["peer"]: summary for summary in records(tmp_path, "summary")}
    assert summaries["hf-plain"]["speedup"]["median"] == 1.0
    assert 0 < summaries["specdec-model-k4"]["acceptance"] <= 1
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_batches_leave_out_what_transformers_refuses(folder: Path, tmp_path: Path) -> None:
    assert run(replace(OPTIONS, pair=folder, out=tmp_path, quick=True, batch=2)) == 0
    summaries = {summary["peer"]: summary for summary in records(tmp_path, "summary")}
    assert "batch size 1" in summaries["hf-assisted-k4"]["skipped"]
    assert summaries["hf-assisted-k4"]["speedup"] is None
    assert summaries["specdec-model-k4"]["speedup"] is not None


def test_sampling_runs_every_peer_to_the_same_length(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(replace(OPTIONS, pair=folder, out=tmp_path, quick=True, temperature=1.0, json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {summary["tokens_per_pass"] for summary in printed["summary"] if summary["peer"] == "hf-plain"} == {1.0}
    assert printed["difference"] == []  # not compared


def test_a_wrong_output_fails_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = specdec_model(4)

    def lying(models: Models, options: BenchOptions) -> Any:
        generate = honest.ready(models, options)

        def wrong(ids: torch.Tensor, seed: int) -> Output:
            output: Output = generate(ids, seed)
            output.ids[0, -1] = (output.ids[0, -1] + 1) % VOCAB
            return output

        return wrong

    ways = [replace(way, ready=lying) if way.name == honest.name else way for way in all_ways(quick=True)]
    monkeypatch.setattr("specdec.experiments.bench.runner.all_ways", lambda *options: ways)
    assert run(replace(OPTIONS, pair=folder, out=tmp_path, quick=True)) == 1
    found = records(tmp_path, "difference")
    assert {(entry["peer"], entry["position"]) for entry in found} == {("specdec-model-k4", OPTIONS.new_tokens - 1)}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory can be reset on Linux only")
def test_peak_memory_sees_what_was_freed_and_forgets_it() -> None:
    _reset_peak()
    before = _status("VmHWM")
    bytes_ = bytearray(b"x") * (64 * 2**20)
    del bytes_
    assert _status("VmHWM") - before > 60
    _reset_peak()
    assert _status("VmHWM") - before < 30


@pytest.mark.slow
def test_memory_is_measured_in_its_own_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = bytearray(b"x") * (512 * 2**20)  # ours, not the child's
    (used,) = measure_memory(["hf-plain"], replace(OPTIONS, pair=folder), lambda name: None)
    assert 0 < used.loaded <= used.peak
    assert used.added < 100
    assert used.peak < _status("VmRSS")
    del ballast


def test_provenance_names_the_program_not_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/private/bin/specdec", "bench", "--quick"])
    source = provenance(seed=3, threads=1)
    assert source["command"] == "specdec bench --quick"
    assert source["git_commit"] is None or len(source["git_commit"]) == 40
    assert source["versions"]["torch"] == torch.__version__
    json.dumps(source)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/somewhere/private/runs/a", "a"), ("--out=/somewhere/a.json", "--out=a.json"), ("/somewhere/dir/", "dir"),
        ("spec-bench:/somewhere/question.jsonl", "spec-bench:question.jsonl"), ("runs/a", "runs/a"), ("-t", "-t"),
        (str(Path(__file__).parents[2] / "experiments" / "results" / "x.json"), "experiments/results/x.json"),
        ("model:tree=3,2,1:children=top", "model:tree=3,2,1:children=top"), ("owner/name", "owner/name"), ("/", "/"),
        ("a / b", "a / b"),
    ],
)  # fmt: skip
def test_provenance_names_files_not_their_places(given: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/private/bin/specdec", "accept", "--x", given])
    source = provenance(seed=3, threads=1, options={"out": Path(given), "several": (given, 3)})
    assert source["command"] == f"specdec accept --x {kept}"
    assert source["options"] == {"out": str(Path(kept)), "several": [kept, 3]}


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
