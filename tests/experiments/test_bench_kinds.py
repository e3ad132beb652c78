"""The benchmark's figures by kind of prompt, and passes of a target that also drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_bench import OPTIONS, VOCAB, make_pair, run_of

from specdec.experiments.bench.measure import ModelClock
from specdec.experiments.bench.stats import by_domain
from specdec.experiments.bench.ways import early_exit, hf_assisted, hf_plain, specdec_model


def test_drafts_by_an_early_exit_are_no_passes_of_the_target(tmp_path: Path) -> None:
    pair = replace(OPTIONS, pair=make_pair(tmp_path)).load()
    ids = torch.randint(0, VOCAB, (1, 12))
    clock, every = ModelClock(), []
    hook = pair.target.register_forward_hook(lambda *_: every.append(1))
    with clock.on(pair.target):
        found = early_exit(0.5).ready(pair, OPTIONS)(ids, 0)
    hook.remove()
    assert found.ids.tolist() == hf_plain().ready(pair, OPTIONS)(ids, 0).ids.tolist()
    assert 1 < clock.passes <= OPTIONS.new_tokens
    assert len(every) > clock.passes  # control: transformers has drafted through the same module


def test_each_kind_of_prompt_has_its_own_figures() -> None:
    seconds = {("hf-plain", 0): 2.0, ("hf-plain", 1): 3.0, ("specdec-model-k4", 0): 1.0, ("specdec-model-k4", 1): 0.5}
    runs = [run_of(peer, prompt, 0, spent) for (peer, prompt), spent in seconds.items()]
    peers = [hf_plain(), hf_assisted(2), specdec_model(4)]  # one of them did not run
    found = {(one.domain, one.peer): one for one in by_domain(peers, runs, ["code", "chat"])}
    assert {key: (one.speedup.median, one.tokens_per_second.median) for key, one in found.items()} == {
        ("code", "hf-plain"): (1, 5), ("code", "specdec-model-k4"): (2, 10),
        ("chat", "hf-plain"): (1, pytest.approx(10 / 3)), ("chat", "specdec-model-k4"): (6, 20),
    }  # fmt: skip
    assert by_domain(peers, runs, ["code", "code"]) == []  # nothing that is not in the summary
