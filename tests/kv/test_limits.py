"""What cannot be served is refused where it is asked for, by name and at once: nothing of that size is built first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import models
import numpy as np
import pytest
import torch

import specdec
from specdec.cli.options import parse_length, parse_tree
from specdec.drafters import BestFirst, DySpec, ModelDrafter, NgramDrafter
from specdec.drafters.sequoia import best_tree, sequoia_tree
from specdec.kv import KVPool, UnsupportedArgumentError, limits
from specdec.pairing import Drafting, PairError, find_pair
from specdec.pairing import schema as pairs
from specdec.pairing.registry import checked
from specdec.verify.topology import Topology

NO_COUNTS = (0, -1, 2.0, "3", math.nan, math.inf, True, [4], np.float32(3), 2**63, 10**400)
"""None of these is a number of anything."""


class Boundless(NgramDrafter):
    """A user's own drafter, whose trees no pass could serve."""

    name = "boundless"

    def __init__(self) -> None:
        super().__init__()
        self.max_nodes = 10**6


def target() -> Any:
    return models.target("llama-gqa", "fp32")


def refused(build: Callable[[], object], named: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UnsupportedArgumentError) as error:
        build()
    assert time.perf_counter() - start < 2.0
    text = str(error.value)
    assert named in text, text
    assert len(text) < 500


COUNTS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "ModelDrafter(k)": ("k", lambda n: ModelDrafter(target(), k=n)),
    "ModelDrafter(tree)": ("tree", lambda n: ModelDrafter(target(), tree=(2, n))),
    "BestFirst(depth)": ("depth", lambda n: BestFirst(depth=n)),
    "BestFirst(top_k)": ("top_k", lambda n: BestFirst(top_k=n)),
    "BestFirst(num_nodes)": ("num_nodes", lambda n: BestFirst(num_nodes=n)),
    "DySpec(depth)": ("depth", lambda n: DySpec(depth=n)),
    "DySpec(num_nodes)": ("num_nodes", lambda n: DySpec(num_nodes=n)),
    "DySpec(max_children)": ("max_children", lambda n: DySpec(max_children=n)),
    "NgramDrafter(k)": ("k", lambda n: NgramDrafter(k=n)),
    "NgramDrafter(branches)": ("branches", lambda n: NgramDrafter(branches=n)),
    "NgramDrafter(max_ngram)": ("max_ngram", lambda n: NgramDrafter(max_ngram=n)),
    "NgramDrafter(min_ngram)": ("min_ngram", lambda n: NgramDrafter(min_ngram=n)),
    "sequoia_tree(num_nodes)": ("num_nodes", lambda n: sequoia_tree([0.5, 0.2], n, 3)),
    "sequoia_tree(max_depth)": ("max_depth", lambda n: sequoia_tree([0.5, 0.2], 3, n)),
    "best_tree(max_depth)": ("max_depth", lambda n: best_tree([0.5, 0.2], {2: 1.0}, 1.0, n)),
    "KVPool(page_size)": ("page_size", lambda n: KVPool({"target": 1}, 4, page_size=n)),
    "KVPool(num_pages)": ("num_pages", lambda n: KVPool({"target": 1}, n)),
    "KVPool(first_pages)": ("first_pages", lambda n: KVPool({"target": 1}, first_pages=n)),
    "KVPool.sized(num_bytes)": ("num_bytes", lambda n: KVPool.sized({"target": target()}, n)),
    "Engine(max_rows)": ("max_rows", lambda n: specdec.Engine(target(), max_rows=n)),
    "Engine(max_step_tokens)": ("max_step_tokens", lambda n: specdec.Engine(target(), max_step_tokens=n)),
    "Engine(max_waiting)": ("max_waiting", lambda n: specdec.Engine(target(), max_waiting=n)),
    "Engine(num_pages)": ("num_pages", lambda n: specdec.Engine(target(), num_pages=n)),
    "Engine(num_bytes)": ("num_bytes", lambda n: specdec.Engine(target(), num_bytes=n)),
    "Engine(page_size)": ("page_size", lambda n: specdec.Engine(target(), num_pages=4, page_size=n)),
    "Engine(k)": ("k", lambda n: specdec.Engine(target(), "ngram", k=n)),
    "Speculator(k) of n-grams": ("k", lambda n: specdec.Speculator(target(), "ngram", k=n)),
    "Speculator(k) of a model": ("k", lambda n: specdec.Speculator(target(), target(), k=n)),
    "Speculator(page_size)": ("page_size", lambda n: specdec.Speculator(target(), cache="paged", page_size=n)),
    "Speculator(strict_width)": (
        "strict_width",
        lambda n: specdec.Speculator(target(), exactness="strict", strict_width=n),
    ),
}
SMALLER = {
    "ModelDrafter(k)": 10**6, "ModelDrafter(tree)": 10**6, "BestFirst(depth)": 10**6, "BestFirst(top_k)": 10**6,
    "BestFirst(num_nodes)": 10**6, "DySpec(depth)": 10**6, "DySpec(num_nodes)": 10**6, "NgramDrafter(k)": 10**6,
    "NgramDrafter(branches)": 10**6, "NgramDrafter(max_ngram)": 10**4, "Speculator(strict_width)": 2**31,
    "KVPool(num_pages)": 2**31, "KVPool.sized(num_bytes)": 10**15, "Engine(num_bytes)": 10**15,
    "Engine(max_rows)": 10**6,
}  # fmt: skip
"""Numbers that are none too large for an int, but for what they mean."""


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_no_count_is_refused_by_name(name: str) -> None:
    argument, build = COUNTS[name]
    for value in (*NO_COUNTS, *([SMALLER[name]] if name in SMALLER else ())):
        refused(lambda value=value: build(value), argument)  # type: ignore[misc]


@pytest.mark.parametrize(
    "tree",
    [(40,) * 4, (1,) * 10**6, (2,) * 64, (10**400,), range(1, 10**9), [[0] * k for k in range(1, 2000)],
     [range(10**9)], "321", b"321", (2.0, 1.0), (math.nan,), (True,), [[0.5]]],
    ids=lambda tree: str(tree)[:24],
)  # fmt: skip
def test_trees_are_counted_before_they_are_built(tree: Any) -> None:
    refused(lambda: ModelDrafter(target(), tree=tree), "tree")
    refused(lambda: specdec.Speculator(target(), target(), tree=tree), "tree")
    refused(lambda: specdec.Engine(target(), target(), tree=tree), "tree")


def test_topologies_are_counted_before_they_are_built() -> None:
    refused(lambda: Topology.chain(10**9), "chain")
    refused(lambda: Topology.widths((40,) * 4), "tree")
    refused(lambda: Topology((-1, *[0] * 10**5)), "tree")
    assert Topology.chain(limits.MOST_NODES).num_nodes == limits.MOST_NODES + 1


def test_policies_count_what_they_run() -> None:
    refused(lambda: BestFirst(depth=1000, top_k=1000), "BestFirst")
    refused(lambda: DySpec(depth=1000, num_nodes=1000), "DySpec")
    refused(lambda: NgramDrafter(k=100, branches=100), "k * branches")
    refused(lambda: sequoia_tree([[0.001] * 999] * 4, 1000, 1000), "levels")
    refused(lambda: specdec.Speculator(target(), Boundless()), "max_nodes of drafter 'boundless'")


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", True, 10**400, None, 0.0])
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    refused(lambda: ModelDrafter(target(), temperature=value), "temperature")
    refused(lambda: best_tree([0.5], {1: value}, 1.0, 1), "verify_ms")
    refused(lambda: specdec.check(target(), "ngram", tokenizer=None, budget_s=value), "budget_s")
    if value != 0:
        refused(lambda: DySpec(threshold=value), "threshold")
        refused(lambda: DySpec(trust=value), "trust")


def test_numbers_of_other_kinds_are_numbers() -> None:
    """Control: what can be served is, at the limit and in NumPy's and torch's integers."""
    most = limits.MOST_NODES
    assert ModelDrafter(target(), k=np.int64(3)).max_nodes == 3  # type: ignore[arg-type]
    assert ModelDrafter(target(), tree=(np.int32(2), 1)).max_nodes == 4
    assert ModelDrafter(target(), k=most).max_depth == most
    assert NgramDrafter(k=torch.tensor(4)).max_depth == 4  # type: ignore[arg-type]
    assert NgramDrafter(k=most // 2, branches=2).max_nodes == most
    spec = specdec.Speculator(target(), "ngram", k=np.int64(3))  # type: ignore[arg-type]
    assert spec.drafter is not None
    assert (spec.drafter.max_depth, spec.planners) == (3, None)
    assert KVPool({"target": 1}, np.int64(4), page_size=np.int64(8)).page_size == 8  # type: ignore[arg-type]
    assert sequoia_tree([0.6, 0.2], np.int64(3), 10**3).num_nodes == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_drafts_beyond_the_targets_positions_are_cut(draft: str) -> None:
    """k may be more than any text has room for: 128 positions here."""
    model: Any = models.target("gpt2", "fp32")
    ids = models.prompts((5,), models.VOCAB, 0)[0]
    wanted = model.generate(ids, max_length=100, do_sample=False)
    drafter = NgramDrafter(k=1000) if draft == "ngram" else ModelDrafter(model, k=1000)
    found: Any = specdec.Speculator(model, drafter).generate(ids, max_length=100, do_sample=False)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "drafting", [{"k": 10**6}, {"suggested_k": 2**40}, {"tree": (40,) * 4}, {"tree": (9,) * 10**5}]
)
def test_pair_files_have_the_same_limits(drafting: dict[str, Any]) -> None:
    from dataclasses import replace

    pair = find_pair("qwen3-8b-0.6b")
    with pytest.raises(
        PairError, match=rf"\[drafting\] {next(iter(drafting))}: expected .*{limits.MOST_NODES}"
    ) as error:
        checked(replace(pair, drafting=Drafting(**drafting)))
    assert len(str(error.value)) < 300
    assert checked(replace(pair, drafting=Drafting(k=limits.MOST_NODES))).num_nodes == limits.MOST_NODES


def test_the_command_line_has_the_same_limits() -> None:
    import typer

    assert (pairs.MOST_NODES, pairs.MOST_THREADS) == (limits.MOST_NODES, limits.MOST_THREADS)
    for text in ("1000000", "9" * 5000, "0", "-1", "nan", "1.0", "\u0663" * 20):
        with pytest.raises(typer.BadParameter, match="--k"):
            parse_length(text)
    for text in ("40,40,40,40", "1," * 5000 + "1", "9" * 4000, "2,,1", "nan", ""):
        with pytest.raises(typer.BadParameter, match="--tree"):
            parse_tree(text)
    assert parse_length(str(limits.MOST_NODES)) == limits.MOST_NODES


@pytest.mark.parametrize("widths", [(1,), (3, 2, 1), (2,) * 9, (32, 31), (1,) * 1024])
def test_nodes_are_counted_as_they_are_built(widths: tuple[int, ...]) -> None:
    assert limits.nodes_of_widths(widths) == pairs.nodes_of_widths(widths) == Topology.widths(widths).num_nodes - 1
