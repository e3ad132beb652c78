"""What another rule, k or tree would have accepted on a text that is already written, from its summary alone.

Let a step's root stand before text position t. Under a lossless rule the text that follows is a draw from the target's
law however the step went, so the joint law of (text, accepted tokens) gives, for every text x,

    F_i = P(at least i drafted tokens accepted | text) = P(the rule's path reaches x_1..x_i) / p(x_1..x_i).

On chains this is a product or a minimum of numbers known at the text's tokens alone (r = q(x)/p(x)): rejection
prod min(1, r_l); naive prod q(x_l); block min over j <= i of prod_{l <= j} r_l (algorithms A.4, read backwards).

On trees F_i is the mean over the drafts of [x_1..x_i is drafted] P(the rule reaches it | draft) / p(x_1..x_i). The
draft is forced to hold the text's tokens and weighted with the probability of that; its other tokens are those stored
in the summary. Siblings off the text are left without children: by the rules' own invariant (a node of weight w emits
with probability w over everything below it; algorithms A.6, A.8) that changes no expectation. The production rule then
judges the tree, over a vocabulary in which tokens of nearly equal p/q stand together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.experiments.accept.setting import Setting
from specdec.experiments.accept.summary import DRAWS, NUM_GROUPS, SIBLINGS, TOP, Summary, group_of
from specdec.shown_errors import ExperimentError
from specdec.verify.rules import make_rule
from specdec.verify.tree import DraftTree

TEXT = NUM_GROUPS
"""Slots of the small vocabulary: the groups, the text's own token, q's best tokens, the drawn ones."""
FIRST_TOP, FIRST_DRAWN = TEXT + 1, TEXT + 1 + TOP
SLOTS = FIRST_DRAWN + SIBLINGS
CHUNK = 2048
"""Trees judged at once."""
MAX_CHILDREN = SIBLINGS
"""A node's children: only so many drawn tokens are stored."""


def refusal(setting: Setting) -> str | None:
    """Why a setting cannot be scored, None if it can."""
    widths = setting.widths
    if widths is None:
        return "its drafts depend on more than the stored summaries (n-grams are looked up in the text instead)"
    if setting.mode in ("mixed", "sampled") and max(widths) > MAX_CHILDREN:
        return f"summaries hold {MAX_CHILDREN} drawn siblings, it has {max(widths)}"
    if max(widths) > TOP:
        return f"summaries hold the {TOP} best tokens, it has {max(widths)} children"
    return None


def reach_law(
    summary: Summary, setting: Setting, rule: str, temperature: float, seed: int = 0, draws: int = DRAWS
) -> np.ndarray:
    """F: float64 `[n, depth + 1]`, F[t, i] as above for the step whose root stands before position t; F[t, 0] = 1.

    0 where the text ends before i tokens. Estimates are unbiased, not bounded: F may exceed 1 a little. On trees each
    position is judged with the first `draws` of its stored drafts.

    Raises:
        ExperimentError: a setting that cannot be scored (see `refusal`).
    """
    why = refusal(setting)
    if why is not None:
        raise ExperimentError(f"{setting}: {why}")
    widths = setting.widths
    assert widths is not None
    if temperature == 0:
        factor = np.stack([(summary.rank < width) & (summary.token == summary.best) for width in widths], 1)
        return _products(factor.astype(float)[:, :, None])
    if rule == "coupled":
        return _products(np.stack([summary.race < width for width in widths], 1).astype(float))
    if setting.mode == "chain":
        return _chain(summary, rule, len(widths))
    fewer = {name: getattr(summary, name)[:, :draws] for name in ("drawn", "drawn_p", "drawn_q")}
    return _tree(summary._replace(**fewer), setting, rule, widths, seed)


def _products(factor: np.ndarray) -> np.ndarray:
    """Products along the text of factors `[n, depth, samples]` that depend on position and depth, averaged."""
    n, depth, samples = factor.shape
    found = np.zeros((n, depth + 1))
    for t in range(n):
        last = min(depth, n - t)
        run = np.ones(samples)
        found[t, 0] = 1.0
        for i in range(last):
            run = run * factor[t + i, i]
            found[t, i + 1] = run.mean()
    return found


def _chain(summary: Summary, rule: str, k: int) -> np.ndarray:
    p, q = summary.p.astype(float), summary.q.astype(float)
    if rule == "naive":
        return _products(np.repeat(q[:, None, None], k, 1))
    if rule == "rejection":
        return _products(np.repeat(np.minimum(1.0, q / p)[:, None, None], k, 1))
    if rule not in ("block", "traversal", "budget_flow"):
        raise ExperimentError(f"{rule}: no formula for sampled chains; ask for block, rejection or naive")
    n = len(p)
    found = np.zeros((n, k + 1))
    for t in range(n):
        r = np.concatenate([[1.0], np.cumprod(q[t : t + k] / p[t : t + k])])
        found[t, : len(r)] = np.minimum.accumulate(r)
    return found


class _Level(NamedTuple):
    """A node of the text and its children, for every position and stored draft: `[n, draws, ...]`.

    weight: probability of a draft that holds the text's token, given its other tokens. children: int64
    `[..., width]`, slots; at: int64, which of them is the text's token; sampled: bool `[..., width]`.
    """

    weight: Tensor
    children: Tensor
    at: Tensor
    sampled: Tensor


def _tree(summary: Summary, setting: Setting, rule: str, widths: Sequence[int], seed: int) -> np.ndarray:
    laws = small_laws(summary)
    generator = torch.Generator().manual_seed(seed)
    levels = {width: _children(summary, setting.mode, width, laws, generator) for width in set(widths)}
    n, draws = summary.drawn.shape[:2]
    text_p = torch.from_numpy(summary.p).double()
    found = torch.zeros(n, len(widths) + 1, dtype=torch.float64)
    found[:, 0] = 1.0
    for depth in range(1, len(widths) + 1):
        roots = torch.arange(max(0, n - depth + 1))
        rows = torch.cartesian_prod(roots, torch.arange(draws))
        value = torch.ones(len(rows), dtype=torch.float64)
        for level in range(depth):
            at = rows[:, 0] + level
            value *= levels[widths[level]].weight[at, rows[:, 1]] / text_p[at]
        alive = value > 0
        if bool(alive.any()):
            kept = rows[alive]
            parts = [_reached(laws, levels, widths[:depth], part, setting.mode, rule) for part in kept.split(CHUNK)]
            value[alive] *= torch.cat(parts)
        found[: len(roots), depth] = value.view(-1, draws).mean(1)
    return found.numpy()


class SmallLaws(NamedTuple):
    """p and q over the slots, float64 `[n, draws, SLOTS]`; drawn: int64 `[n, draws, SIBLINGS]`, slots of the stored
    draws; top: int64 `[n, TOP]`, slots of q's best tokens."""

    p: Tensor
    q: Tensor
    drawn: Tensor
    top: Tensor


def small_laws(summary: Summary) -> SmallLaws:
    """Both laws with every token that a draft may hold in a slot of its own and the others in their groups."""
    token, top, drawn = (torch.from_numpy(getattr(summary, name)) for name in ("token", "top", "drawn"))
    n, draws = drawn.shape[:2]
    is_text = drawn == token[:, None, None]
    same = drawn[:, :, :, None] == top[:, None, None, :]
    slot = torch.where(same.any(-1), FIRST_TOP + same.int().argmax(-1), FIRST_DRAWN + torch.arange(SIBLINGS))
    slot = torch.where(is_text, TEXT, slot)
    top_slot = torch.where(top == token[:, None], TEXT, FIRST_TOP + torch.arange(TOP))
    own = slot >= FIRST_DRAWN  # drawn, and neither the text's nor among the best
    groups_of = _Groups.of(summary)
    laws = []
    for name in ("p", "q"):
        masses = {part: torch.from_numpy(getattr(summary, f"{part}_{name}")).double() for part in ("top", "drawn")}
        text = torch.from_numpy(getattr(summary, name)).double()
        groups = torch.from_numpy(getattr(summary, f"group_{name}")).double()
        law = torch.zeros(n, draws, SLOTS, dtype=torch.float64)
        law[:, :, :NUM_GROUPS] = groups[:, None]
        law[:, :, TEXT] = text[:, None]
        law[:, :, FIRST_TOP:FIRST_DRAWN] = torch.where(top_slot == TEXT, 0.0, masses["top"])[:, None]
        law[:, :, FIRST_DRAWN:] = torch.where(own, masses["drawn"], 0.0)
        law.scatter_add_(2, groups_of.drawn, -law[:, :, FIRST_DRAWN:])
        for part, of in ((TEXT, groups_of.text), (slice(FIRST_TOP, FIRST_DRAWN), groups_of.top)):
            law.scatter_add_(2, of.expand(n, draws, -1), -law[:, :, part].view(n, draws, -1))
        laws.append(law.clamp_(min=0.0))
    return SmallLaws(laws[0], laws[1], slot, top_slot)


class _Groups(NamedTuple):
    """The groups that tokens with a slot of their own are taken out of, `[n, draws or 1, tokens]`."""

    text: Tensor
    top: Tensor
    drawn: Tensor

    @staticmethod
    def of(summary: Summary) -> _Groups:
        pairs = [("p", "q"), ("top_p", "top_q"), ("drawn_p", "drawn_q")]
        text, top, drawn = (group_of(*(torch.from_numpy(getattr(summary, name)) for name in pair)) for pair in pairs)
        return _Groups(text[:, None, None], top[:, None], drawn)


def _children(summary: Summary, mode: str, width: int, laws: SmallLaws, generator: torch.Generator) -> _Level:
    """Drafts of `width` children that hold the text's token."""
    n, draws = summary.drawn.shape[:2]
    rank = torch.from_numpy(summary.rank)[:, None].expand(n, draws)
    q_x = torch.from_numpy(summary.q).double()[:, None].expand(n, draws)
    top = laws.top[:, None].expand(n, draws, TOP)
    if mode == "top":
        return _Level((rank < width).double(), top[..., :width], rank.clamp(max=width - 1),
                      torch.zeros(n, draws, width, dtype=torch.bool))  # fmt: skip
    if mode == "mixed":
        fixed = width - 1
        mass = torch.from_numpy(summary.top_q[:, :fixed]).double().sum(1)[:, None]
        chosen = rank < fixed
        off = _first_off(laws.drawn, top[..., :fixed])
        last = torch.where(chosen, off, TEXT)
        weight = torch.where(chosen, 1.0, q_x / (1.0 - mass).clamp(min=1e-9))
        children = torch.cat([top[..., :fixed], last[..., None]], -1)
        sampled = (torch.arange(width) == fixed).expand(n, draws, width)
        return _Level(weight, children, torch.where(chosen, rank, fixed), sampled)
    others = _without_text(laws.drawn, width - 1)
    taken = torch.cat([torch.zeros(n, draws, 1, dtype=torch.float64), laws.q.gather(2, others).cumsum(-1)], -1)
    left = (1.0 - taken).clamp(min=1e-12)
    here = q_x[..., None] / left
    later = torch.cat([torch.ones_like(q_x)[..., None], (1.0 - here[..., :-1]).clamp(min=0).cumprod(-1)], -1)
    chance = later * here  # P(the text's token is drawn as number r | the order of the others)
    weight = chance.sum(-1)
    at = torch.multinomial(chance.flatten(0, 1) + 1e-300, 1, generator=generator).view(n, draws)
    index = torch.arange(width)
    source = torch.where(index < at[..., None], index, index - 1).clamp(min=0)
    padded = others if width > 1 else torch.full((n, draws, 1), TEXT)
    children = torch.where(index == at[..., None], TEXT, padded.gather(2, source.clamp(max=padded.shape[2] - 1)))
    return _Level(weight, children, at, torch.ones(n, draws, width, dtype=torch.bool))


def _first_off(drawn: Tensor, fixed: Tensor) -> Tensor:
    """The first stored draw that is none of the `fixed` slots: a draw from q off them."""
    free = ~(drawn[..., :, None] == fixed[..., None, :]).any(-1)
    return drawn.gather(2, free.int().argmax(-1)[..., None])[..., 0]


def _without_text(drawn: Tensor, count: int) -> Tensor:
    """The first `count` stored draws other than the text's token, in order."""
    order = (drawn == TEXT).int().sort(dim=-1, stable=True).indices
    return drawn.gather(2, order)[..., :count]


def _reached(
    laws: SmallLaws, levels: dict[int, _Level], widths: Sequence[int], rows: Tensor, mode: str, rule: str
) -> Tensor:
    """P(the rule keeps the path to the text's node of the last level | draft), float64 `[rows]`.

    Args:
        rows: int64 `[rows, 2]`: the position of the root and the number of the stored draft.
    """
    count, depth = len(rows), len(widths)
    nodes = 1 + sum(widths)
    tokens = torch.zeros(count, nodes, dtype=torch.int64)
    parents = torch.full((count, nodes), -1)
    sampled = torch.zeros(count, nodes, dtype=torch.bool)
    p = torch.full((count, nodes, SLOTS), 1.0 / SLOTS, dtype=torch.float64)  # leaves' rows decide nothing
    q = torch.zeros(count, depth, SLOTS, dtype=torch.float64)
    q_row = torch.full((count, nodes), -1)
    path, first = torch.zeros(count, dtype=torch.int64), 1
    index = torch.arange(count)
    for level, width in enumerate(widths):
        at, draft = rows[:, 0] + level, rows[:, 1]
        made = levels[width]
        p[index, path] = laws.p[at, draft]
        law = laws.q[at, draft]
        if mode == "mixed":  # the last child came from q off the others
            law = law.scatter(1, made.children[at, draft, :-1], 0.0)
        q[:, level] = law / law.sum(1, keepdim=True)
        q_row[index, path] = level
        part = slice(first, first + width)
        tokens[:, part], sampled[:, part] = made.children[at, draft], made.sampled[at, draft]
        parents[:, part] = path[:, None]
        path, first = first + made.at[at, draft], first + width
    drawn = mode != "top"
    num_nodes = torch.full((count,), nodes)
    tree = DraftTree(tokens, parents, num_nodes, sampled, q if drawn else None, q_row if drawn else None)
    end = make_rule(rule).end_law(tree, p)
    assert end is not None
    return end[index, path]
