"""Greedy text equals plain `transformers` greedy text, token by token, for random models, prompts and drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import checker
import models
import pytest
import torch
from checker import Case, Drafting, NearTies
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kv.shared import SharedKVCache
from specdec.verify.passes import forward
from specdec.verify.rules.greedy import Greedy
from specdec.verify.tree import DraftTree, Verdict

EXAMPLES_PER_FAMILY = 28
EXAMPLES_FP32 = 120

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple)
EOS = st.sampled_from([models.EOS, None, (2, 5, 9, 17, 23), (3, 11, 30)])


def cases(family: st.SearchStrategy[str], dtype: str, drafting: st.SearchStrategy[Drafting]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        family=family,
        dtype=st.just(dtype),
        lengths=LENGTHS,
        drafting=drafting,
        new_tokens=st.integers(1, 20),
        seed=st.integers(0, 2),
        prompt_seed=st.integers(0, 10**6),
        period=st.sampled_from([0, 0, 2, 3]),
        eos=EOS,
        attention=st.sampled_from(["sdpa", "sdpa", "eager"]),
    )


@pytest.fixture(scope="module")
def ties() -> Iterator[NearTies]:
    """Shared by the module's cases; near-ties must stay rare over all of them."""
    counted = NearTies()
    yield counted
    counted.assert_rare()


@pytest.mark.parametrize("family", models.FAMILIES)
@settings(max_examples=EXAMPLES_PER_FAMILY)
@given(data=st.data())
def test_fp64_tokens_equal_plain_greedy(family: str, ties: NearTies, data: st.DataObject) -> None:
    checker.compare(data.draw(cases(st.just(family), "fp64", checker.draftings())), ties)


@pytest.mark.parametrize("kind", ["chain", "tree", "ngram"])
@settings(max_examples=EXAMPLES_FP32)
@given(data=st.data())
def test_fp32_tokens_equal_plain_greedy(kind: str, ties: NearTies, data: st.DataObject) -> None:
    drafting = checker.draftings(kinds=(kind,))
    checker.compare(data.draw(cases(st.sampled_from(models.FAMILIES), "fp32", drafting)), ties)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "gpt2"])
def test_long_outputs_outgrow_the_first_allocation(family: str) -> None:
    """More than the slots allocated at first: storage grows while trees are in flight."""
    for drafting in (Drafting("tree", "near", widths=(3, 2, 1)), Drafting("ngram", k=8, branches=3)):
        case = Case(family, "fp64", (5, 2, 9), drafting, new_tokens=110)
        report = checker.compare(case, NearTies(), eos_token_id=None)
        assert report.num_accepted_tokens > 0


def test_the_drafts_of_these_cases_are_really_mixed() -> None:
    """Equality would be cheap if nothing, or everything, were accepted."""
    rates = []
    for kind in ("near", "far"):
        case = Case("llama-gqa", "fp64", (6, 3, 8), Drafting("chain", kind, 4), new_tokens=40)
        rates.append(checker.compare(case, NearTies(), eos_token_id=None).draft_acceptance_rate)
    assert 0.0 < rates[1] < rates[0] < 1.0


def _one_node_too_many(original: Callable[..., Verdict]) -> Callable[..., Verdict]:
    def broken(self: Greedy, tree: DraftTree, p: torch.Tensor, noise: object) -> Verdict:
        verdict = original(self, tree, p, noise)
        node = verdict.path.gather(1, verdict.num_accepted[:, None])
        child = ((tree.parents == node) & tree.valid).float()
        if not bool(child.any(1).all()):
            return verdict
        path = torch.cat([verdict.path, torch.full_like(node, -1)], 1)
        path.scatter_(1, verdict.num_accepted[:, None] + 1, child.argmax(1, keepdim=True))
        return Verdict(path[:, : int(tree.depths.max()) + 1], verdict.num_accepted + 1, verdict.next_token)

    return broken


def _everything_visible(original: Callable[..., Any]) -> Callable[..., Any]:
    def broken(tree: Any, lengths: Any) -> Any:
        nodes = original(tree, lengths)
        return nodes and nodes._replace(ancestors=torch.ones_like(nodes.ancestors))

    return broken


def _slots_as_positions(original: Callable[..., Any]) -> Callable[..., Any]:
    def broken(tree: Any, lengths: Any) -> Any:
        nodes = original(tree, lengths)
        return nodes and nodes._replace(depths=torch.arange(nodes.depths.shape[1]).expand_as(nodes.depths))

    return broken


def _no_gather(original: Callable[..., None]) -> Callable[..., None]:
    def broken(self: SharedKVCache, paths: list[list[int]]) -> None:
        original(self, [list(range(len(path))) for path in paths])

    return broken


@pytest.mark.parametrize(
    ("owner", "method", "breaker"),
    [
        (Greedy, "__call__", _one_node_too_many),
        (forward, "nodes_of", _everything_visible),
        (forward, "nodes_of", _slots_as_positions),
        (SharedKVCache, "commit", _no_gather),
    ],
    ids=["accepts-one-too-many", "wrong-ancestor-mask", "slots-as-positions", "commit-without-gather"],
)
def test_the_checker_catches_broken_variants(
    owner: Any, method: str, breaker: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("llama-gqa", "fp64", (6, 3), Drafting("tree", "near", widths=(3, 2, 1)), new_tokens=24)
    checker.compare(case, NearTies(), eos_token_id=None)
    monkeypatch.setattr(owner, method, breaker(getattr(owner, method)))
    with pytest.raises(AssertionError, match="first difference"):
        checker.compare(case, NearTies(), eos_token_id=None)
