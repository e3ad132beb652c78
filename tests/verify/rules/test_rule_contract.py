"""The contract every acceptance rule keeps, whatever its mathematics."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from oracle.cases import CASES, VOCAB, random_trees
from oracle.instances import TREES
from oracle.production import Batch, batch
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.draft_kind import DraftKind
from specdec.verify.noise import Noise
from specdec.verify.rules import RULES, UnsupportedTreeError, auto_rule, make_rule
from specdec.verify.topology import Topology
from specdec.verify.tree import DraftTree, Verdict

LAST = 1.0 - 2.0**-52
every_case = pytest.mark.parametrize(("rule", "kind"), CASES)


class Problem(NamedTuple):
    rows: Batch
    noise: Noise


@cache
def problem(kind: str, seed: int = 11, dtype: torch.dtype = torch.float64) -> Problem:
    """300 ragged trees with width padding, coins that include the ends of [0, 1), padding that looks acceptable."""
    rows = batch(random_trees(kind, seed), VOCAB, extra=2, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    shape = rows.tree.tokens.shape
    accept = torch.rand(shape, generator=generator, dtype=torch.float64)
    edge = torch.rand(shape, generator=generator)
    accept = torch.where(edge < 0.1, 0.0, torch.where(edge > 0.9, LAST, accept))
    accept = torch.where(rows.tree.valid, accept, 0.0)
    residual = torch.rand(shape[0], generator=generator, dtype=torch.float64)
    residual[::7], residual[3::7] = 0.0, LAST
    race = -(-torch.rand((*shape, VOCAB), generator=generator, dtype=torch.float64)).log1p()
    race = torch.where(torch.rand(race.shape, generator=generator) < 0.02, 0.0, race)
    return Problem(rows, Noise(accept, residual, race))


def run(rule: str, given: Problem) -> Verdict:
    return make_rule(rule)(given.rows.tree, given.rows.p, given.noise)


def tensors(noise: Noise) -> list[Tensor]:
    assert noise.race is not None
    return [noise.accept, noise.residual, noise.race]


def ends(verdict: Verdict) -> Tensor:
    return verdict.path.gather(1, verdict.num_accepted[:, None])[:, 0]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_path_leads_from_the_root_over_real_nodes(rule: str, kind: str, dtype: torch.dtype):
    given = problem(kind, dtype=dtype)
    tree, verdict = given.rows.tree, run(rule, given)
    assert verdict.path.dtype == verdict.num_accepted.dtype == verdict.next_token.dtype == torch.int64
    rows = (verdict.path, verdict.num_accepted, tree.num_nodes, tree.parents)
    for path, count, num_nodes, parents in zip(*(tensor.tolist() for tensor in rows), strict=True):
        assert path[0] == 0
        assert path[count + 1 :] == [-1] * (len(path) - count - 1)
        kept = path[: count + 1]
        assert max(kept) < num_nodes, "a padding node was accepted"
        assert [parents[node] for node in kept] == [-1, *kept[:-1]]
    assert int(verdict.num_accepted.max()) > 0, "nothing is ever accepted: the test would not see a wrong path"


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_probability_zero_are_never_emitted(rule: str, kind: str, dtype: torch.dtype):
    given = problem(kind, dtype=dtype)
    tree, p, verdict = given.rows.tree, given.rows.p, run(rule, given)
    index = torch.arange(p.shape[0])
    for column in range(1, verdict.path.shape[1]):
        on = verdict.path[:, column] >= 0
        node, parent = verdict.path[on, column], verdict.path[on, column - 1]
        assert bool((p[index[on], parent, tree.tokens[index[on], node]] > 0).all())
    assert bool((p[index, ends(verdict), verdict.next_token] > 0).all())


@every_case
def test_float32_decides_as_float64(rule: str, kind: str):
    single, double = (run(rule, problem(kind, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    same = (ends(single) == ends(double)) & (single.next_token == double.next_token)
    # Coins at 0 and 1 - 2^-52 lie on thresholds; everywhere else the two agree.
    assert same.double().mean() > 0.97


@every_case
def test_a_row_does_not_depend_on_the_rows_around_it(rule: str, kind: str):
    given = problem(kind)
    together = run(rule, given)
    for row in range(0, given.rows.p.shape[0], 9):
        only = given.rows.take(torch.tensor([row]))
        own = Noise(*(part[row : row + 1] for part in tensors(given.noise)))
        alone = make_rule(rule)(only.tree, only.p, own)
        assert int(ends(alone)[0]) == int(ends(together)[row])
        assert int(alone.next_token[0]) == int(together.next_token[row])


@every_case
def test_a_rule_is_a_pure_function_without_global_randomness(rule: str, kind: str):
    given = problem(kind)
    before = [tensor.clone() for tensor in (given.rows.p, given.rows.tree.tokens, *tensors(given.noise))]
    state = torch.random.get_rng_state()
    first, second = run(rule, given), run(rule, given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())
    after = (given.rows.p, given.rows.tree.tokens, *tensors(given.noise))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"


@pytest.mark.parametrize("rule", list(RULES))
def test_no_proposal_means_plain_sampling(rule: str):
    p = torch.tensor([[[0.25, 0.0, 0.75]]], dtype=torch.float64).expand(4, 1, 3)
    race = torch.tensor([[0.1, 0.0, 1.0], [0.3, 0.0, 1.0], [1.0, 0.0, 0.1], [0.35, 0.0, 1.0]], dtype=torch.float64)
    residual = torch.tensor([0.0, 0.2499, 0.2501, LAST], dtype=torch.float64)
    noise = Noise(torch.zeros(4, 1, dtype=torch.float64), residual, race[:, None])
    verdict = make_rule(rule)(DraftTree.root_only(torch.zeros(4, dtype=torch.int64)), p, noise)
    assert verdict.num_accepted.tolist() == [0] * 4
    assert verdict.next_token.tolist() == ([2] * 4 if rule == "greedy" else [0, 0, 2, 2])


@pytest.mark.parametrize(("rule", "kind"), [(r, k) for r in RULES for k in TREES if (r, k) not in CASES])
def test_other_trees_are_refused_with_the_reason(rule: str, kind: str):
    siblings = [tree for tree in random_trees(kind, 16) if len(set(tree.parents)) < len(tree.parents)]
    rows = batch(siblings[:8], VOCAB)
    noise = Noise(torch.zeros(rows.tree.tokens.shape, dtype=torch.float64), torch.zeros(8, dtype=torch.float64))
    with pytest.raises(UnsupportedTreeError, match=rf"{rule!r}.*: use rule="):
        make_rule(rule)(rows.tree, rows.p, noise)


@pytest.mark.parametrize("rule", list(RULES))
def test_a_rule_is_found_by_its_name_and_says_whether_it_is_lossless(rule: str):
    assert RULES[rule].name == make_rule(rule).name == rule
    assert isinstance(RULES[rule].lossless, bool)


def test_an_unknown_rule_is_refused_with_the_names_there_are():
    with pytest.raises(UnsupportedArgumentError, match="'block'"):
        make_rule("blocks")


@pytest.mark.parametrize("rule", list(RULES))
def test_a_shared_topology_changes_nothing(rule: str):
    generator = torch.Generator().manual_seed(5)
    topology = Topology.chain(3)
    q = torch.rand(64, 3, 7, generator=generator, dtype=torch.float64).softmax(-1)
    p = torch.rand(64, 4, 7, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    tokens = torch.zeros(64, 4, dtype=torch.int64)
    tokens[:, 1:] = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(64, 3)
    tree = DraftTree.build(topology, tokens, q)
    loose = DraftTree(tree.tokens, tree.parents, tree.num_nodes, tree.sampled, tree.q, tree.q_row)
    accept, residual, race = (torch.rand(64, *shape, generator=generator).double() for shape in ((4,), (), (4, 7)))
    noise = Noise(accept, residual, race)
    shared, own = make_rule(rule)(tree, p, noise), make_rule(rule)(loose, p, noise)
    assert torch.equal(ends(shared), ends(own))
    assert torch.equal(shared.next_token, own.next_token)


@pytest.mark.parametrize("kind", ["sampled", "mixed", "deterministic"])
@pytest.mark.parametrize("rule", ["traversal", "budget_flow"])
def test_on_a_chain_the_tree_rules_are_block_verification_coin_for_coin(rule: str, kind: str):
    given = problem(kind)
    inside = ((given.noise.accept > 0) & (given.noise.accept < LAST)) | ~given.rows.tree.valid
    clear = inside[:, 1:].all(1) & (given.noise.residual > 0) & (given.noise.residual < LAST)
    expected, verdict = run("block", given), run(rule, given)
    assert int(clear.sum()) > 100
    assert torch.equal(ends(verdict)[clear], ends(expected)[clear])
    assert torch.equal(verdict.next_token[clear], expected.next_token[clear])


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("sampled", "block"),
        ("mixed", "block"),
        ("one_sampled", "budget_flow"),
        ("fixed", "naive"),
        ("without_replacement", "traversal"),
    ],
)
def test_the_automatic_rule_takes_the_tree_it_is_chosen_for(kind: str, rule: str):
    given = problem(kind)
    chosen = auto_rule(DraftKind.of(given.rows.tree))
    assert chosen.name == rule
    assert chosen.lossless
    chosen.check(given.rows.tree)


def test_a_race_that_was_not_given_is_asked_for():
    given = problem("fixed")
    with pytest.raises(UnsupportedArgumentError, match=r"noise\.race with \d+ depths, got None"):
        make_rule("coupled")(given.rows.tree, given.rows.p, given.noise._replace(race=None))
