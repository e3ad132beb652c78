"""Targets whose weights are fetched for every pass: the text is plain generate's, the bytes reported are those read."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, noisy_copy
from torch import Tensor
from transformers import LlamaForCausalLM

from specdec import BestFirst, Speculator
from specdec.drafters import ModelDrafter
from specdec.kv.versions import cache_of
from specdec.kv.wrappers import bytes_moved_by_a_pass
from specdec.planner.acceptance import AcceptanceHistory, Known
from specdec.planner.batch_planner import BatchPlanner
from specdec.planner.costs import Costs
from specdec.planner.options import LARGE_TREES, Options
from specdec.verify.weights import Weights

PROMPT = torch.tensor([[5, 9, 12, 7, 5, 9]])
GREEDY: dict[str, Any] = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)


class Counting(Mapping[str, Tensor]):
    """Weights on a disk, and how many bytes of them were read."""

    def __init__(self, inner: Any, read: list[int]):
        self._inner, self._read = inner, read

    def __getitem__(self, key: str) -> Tensor:
        found: Tensor = self._inner[key]
        self._read.append(found.nbytes)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


def offloaded(folder: Path, where: Any) -> tuple[Any, list[int]]:
    """The model saved in `folder`, placed; and the bytes of every weight that is read from now on."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, device_map=where, offload_folder=str(folder / "offloaded"))
    read: list[int] = []
    for part in model.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is not None:
            hook.weights_map = Counting(hook.weights_map, read)
    return model, read


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model: Any = copy.deepcopy(llama(3, layers=3))
    folder = tmp_path_factory.mktemp("offloaded-target")
    model.save_pretrained(folder)
    return model, folder


PLACES = {
    "all on disk": {"": "disk"},
    "in part": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"},
}  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "how", [{"draft": None}, {"k": 3}, {"tree": BestFirst(depth=4, top_k=3, num_nodes=8)}], ids=str
)
def test_text_is_plain_generates_and_bytes_are_those_read(saved: Any, where: str, how: dict[str, Any]) -> None:
    whole, folder = saved
    target, read = offloaded(folder, PLACES[where])
    spec = Speculator(target, **{"draft": noisy_copy(whole, 0.02), **how})
    out: Any = spec.generate(PROMPT, **GREEDY)
    assert torch.equal(out, whole.generate(PROMPT, **GREEDY))
    report = spec.report
    assert report is not None
    passes = report.num_steps + ("tree" in how)  # which cannot be read in one pass with the prompt
    assert report.bytes_moved == sum(read) == bytes_moved_by_a_pass(target) * passes > 0
    assert report.bytes_moved_per_token == sum(read) / report.num_emitted_tokens
    assert "weights fetched" in report.summary()


def test_passes_keep_nothing_for_autograd(saved: Any) -> None:
    """Weights that come and go are ordinary parameters, which ask for gradients."""
    _, folder = saved
    target, _ = offloaded(folder, PLACES["all on disk"])
    asked: dict[str, Any] = dict(return_dict_in_generate=True, output_logits=True)
    out: Any = Speculator(target).generate(PROMPT, **GREEDY, **asked)
    assert not any(logits.requires_grad for logits in out.logits)
    assert not cache_of(out).layers[0].keys.requires_grad


def test_nothing_is_fetched_of_a_model_that_is_where_it_runs(saved: Any) -> None:
    whole, _ = saved
    assert bytes_moved_by_a_pass(whole) == 0
    spec = Speculator(whole)
    spec.generate(PROMPT, **GREEDY)
    assert spec.report is not None
    assert spec.report.bytes_moved == 0
    assert "weights fetched" not in spec.report.summary()


def test_a_large_tree_emits_three_times_as_many_tokens_per_byte(saved: Any) -> None:
    whole, folder = saved
    target, _ = offloaded(folder, PLACES["all on disk"])
    per_token = []
    for how in ({"draft": None}, {"draft": noisy_copy(whole, 0.02), "tree": LARGE_TREES[0]}):
        spec = Speculator(target, **how)
        spec.generate(PROMPT, **GREEDY)
        assert spec.report is not None
        per_token.append(spec.report.bytes_moved_per_token)
    assert per_token[0] >= 3 * per_token[1]


def test_a_look_for_changes_fetches_nothing(saved: Any) -> None:
    _, folder = saved
    target, read = offloaded(folder, PLACES["all on disk"])
    watched = Weights([target])
    assert not watched.changed()
    assert not read


def planned(options: Options, cost_of_a_node: float) -> str:
    """The option chosen where a pass costs 100 ms and each of its nodes so many more; of chains four tokens in five are
    kept, of a tree's levels more, and the more the larger it is."""
    steps, beliefs = {}, {}
    for option in options.options:
        nodes, deepest = option.drafter.max_nodes, len(option.widths)
        depths = range(1, deepest + 1) if option.any_depth else (deepest,)
        steps[option.name] = {d: 100 + cost_of_a_node * (d if option.any_depth else nodes) for d in depths}
        history = AcceptanceHistory(deepest, 1)
        kept = 4 if option.any_depth else deepest - 1
        for _ in range(30):
            history.add(option.widths, [0], [min(kept + 1, deepest)], [kept])
        beliefs[option.family] = history.belief
    costs = Costs(1, 100.0, steps, 0.0, 0.0, {}, {}, 0.0)
    planner = BatchPlanner(options, lambda rows: costs, 1, 8, Known(beliefs, {}))
    budget = planner.budget([0], [1000])
    return options.options[budget.option].name if max(budget.depths) else "plain"


def test_trees_are_planned_where_weights_are_fetched_and_their_size_follows_costs(saved: Any) -> None:
    whole, folder = saved
    target, _ = offloaded(folder, PLACES["all on disk"])
    draft = noisy_copy(whole, 0.02)
    options: Any = Speculator(target, draft).drafter.inner  # type: ignore[union-attr]
    sizes = [one.drafter.max_nodes for one in options.options if not one.any_depth]
    assert sizes == [tree.max_nodes for tree in LARGE_TREES]
    usual: Any = Speculator(whole, draft).drafter.inner  # type: ignore[union-attr]
    assert all(one.any_depth and isinstance(one.drafter, ModelDrafter) for one in usual.options)
    assert [planned(options, ms) for ms in (0.01, 2.0, 20.0)] == ["model tree of 240", "model tree of 24", "model"]


def test_planned_text_is_plain_generates(saved: Any) -> None:
    whole, folder = saved
    target, read = offloaded(folder, PLACES["all on disk"])
    spec = Speculator(target, noisy_copy(whole, 0.02))
    out: Any = spec.generate(PROMPT, **GREEDY)
    assert torch.equal(out, whole.generate(PROMPT, **GREEDY))
    assert spec.report is not None
    assert 0 < spec.report.bytes_moved <= sum(read)  # what was read to measure costs is not the call's
