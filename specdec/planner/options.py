"""Several drafters over one call, of which the planner names one (or one and a second best) at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from specdec.drafters import Budget, Drafter, ModelDrafter, NgramDrafter, Session
from specdec.drafters.best_first import BestFirst
from specdec.kv import UnsupportedArgumentError
from specdec.verify import DraftTree, Verdict
from specdec.verify.draft_kind import DraftKind
from specdec.verify.rules import make_rule

MODEL_DEPTH = 12
"""Longest chain planned with a draft model."""
NGRAM_DEPTH = 10
"""Longest continuation planned with prompt lookup."""
LARGE_TREES = (
    BestFirst(depth=8, top_k=8, num_nodes=24),
    BestFirst(depth=12, top_k=16, num_nodes=96),
    BestFirst(depth=16, top_k=16, num_nodes=240),
)
"""Planned beside chains where a pass fetches weights: what it costs then hardly depends on how many tokens it reads
(SpecExec, arXiv 2406.02532). Which of them pays is a matter of what passes over them are measured to cost."""


@dataclass(frozen=True)
class Option:
    """One way to draft.

    family: options of one family share what is learned of acceptance, by depth and number of siblings.
    widths: children per node, level by level.
    any_depth: any number of leading levels may be asked for; else all of them.
    may_be_empty: it often has nothing to propose, finding out costs next to nothing, and it proposes no sampled
        tokens (n-grams).
    positions: tokens of a row that its drafter can read, None for any number.
    """

    name: str
    family: str
    drafter: Drafter
    widths: tuple[int, ...]
    any_depth: bool = True
    may_be_empty: bool = False
    positions: int | None = None


@dataclass(frozen=True)
class OptionBudget(Budget):
    """A budget that names the option to ask.

    least_rows: it must propose something for so many rows; else `otherwise` is asked (None: decode plainly).
    beside: this option, which proposes deterministic chains, is asked as well, only to see what it would have said.
    """

    option: int = 0
    least_rows: int = 0
    otherwise: OptionBudget | None = None
    beside: int | None = None


def chains(tree: DraftTree) -> list[list[int]]:
    """What each row's chain drafts."""
    return [row[1:count] for row, count in zip(tree.tokens.tolist(), tree.num_nodes.tolist(), strict=True)]


class Options(Drafter):
    """Asks the option named by a `OptionBudget`; options of one model share its K/V in the shared cache.

    Which option is asked never depends on a token drawn in this step: the second one is asked when the first, which
    proposes deterministic tokens only, found too little in the text so far (algorithms B.5).

    Attributes:
        used: index of the option whose proposal was returned last; None after an empty one.
        asked: (option, rows for which it had something) of the last step's options that may be empty.
        heard: (option, its chain for every live row) where one was asked beside the one that was used.
    """

    def __init__(self, options: Sequence[Option]):
        self.options = tuple(options)
        self.name = "+".join(dict.fromkeys(option.drafter.name for option in options))
        self.max_depth = max(option.drafter.max_depth for option in options)
        self.max_nodes = max(option.drafter.max_nodes for option in options)
        self._session: Session | None = None
        self.used: int | None = None
        self.asked: list[tuple[int, int]] = []
        self.heard: tuple[int, list[list[int]]] | None = None
        own = {id(drafter.model) for drafter in self._models() if not drafter.shares_target_kv}
        if len(own) > 1 or (own and self.shares_target_kv):
            got = f"{len(own)} and the target itself" if self.shares_target_kv else f"{len(own)}"
            raise UnsupportedArgumentError(
                "draft: expected at most one model among several drafters (they would share one K/V storage), got "
                f"{got}; combine one model with 'ngram', or forms of the target itself ('self:int8') with 'ngram'"
            )

    @property
    def notes(self) -> Sequence[str]:  # type: ignore[override]  # read only here
        return list(dict.fromkeys(note for option in self.options for note in option.drafter.notes))

    @property
    def kind(self) -> DraftKind | None:
        """That of all options, or None where they differ: each tree is then judged by what it is."""
        kinds = {option.drafter.kind for option in self.options}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def looks_ahead(self) -> bool:
        return any(option.drafter.looks_ahead for option in self.options)

    @property
    def num_uniforms(self) -> int:
        return max(option.drafter.num_uniforms for option in self.options)

    @property
    def tail_slots(self) -> int:
        return max(option.drafter.tail_slots for option in self.options)

    def nodes_within(self, depth: int) -> int:
        return max(option.drafter.nodes_within(depth) for option in self.options)

    @property
    def num_cache_layers(self) -> int:
        return max(option.drafter.num_cache_layers for option in self.options)

    @property
    def shares_target_kv(self) -> bool:
        return any(option.drafter.shares_target_kv for option in self.options)

    @contextmanager
    def running(self) -> Iterator[None]:
        with ExitStack() as stack:
            for drafter in self._once():
                stack.enter_context(drafter.running())
            yield

    def start(self, session: Session) -> None:
        self._session = session
        self.used, self.asked, self.heard = None, [], None
        for option in self.options:
            option.drafter.start(session)

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        assert self._session is not None, "propose() before start()"
        self.used, self.asked, self.heard = None, [], None
        now: OptionBudget | None
        now = budget if isinstance(budget, OptionBudget) else OptionBudget(budget.depths, budget.max_nodes)
        if now.beside is not None:
            said = self.options[now.beside].drafter.propose(now, uniforms[:, :0])
            self.heard = now.beside, chains(said)
        while now is not None and now.max_depth > 0:
            option = self.options[now.option]
            tree = option.drafter.propose(now, uniforms[:, : option.drafter.num_uniforms])
            if option.may_be_empty:
                found = sum(count > 1 for count in tree.num_nodes.tolist())
                self.asked.append((now.option, found))
            if not option.may_be_empty or found >= max(1, now.least_rows):
                self.used = now.option
                return tree
            now = now.otherwise
        return DraftTree.root_only(self._session.rows.roots())

    def observe(self, verdict: Verdict, logits: Tensor) -> None:
        for option in self.options:
            option.drafter.observe(verdict, logits)

    def join(self, rows: Sequence[int]) -> None:
        for option in self.options:
            option.drafter.join(rows)

    def stop(self, rows: Sequence[int]) -> None:
        for option in self.options:
            option.drafter.stop(rows)

    def clone(self) -> Options:
        return Options([replace(option, drafter=option.drafter.clone()) for option in self.options])

    def finish(self) -> None:
        self._session = None
        for option in self.options:
            option.drafter.finish()

    def _models(self) -> list[ModelDrafter]:
        return [option.drafter for option in self.options if isinstance(option.drafter, ModelDrafter)]

    def _once(self) -> list[Drafter]:
        """The drafters, of those that run one model only the first: it is prepared once."""
        models: dict[int, Drafter] = {}
        for option in self.options:
            drafter = option.drafter
            models.setdefault(id(drafter.model if isinstance(drafter, ModelDrafter) else drafter), drafter)
        return list(models.values())


def make_options(drafters: Sequence[Drafter], rule: str, most_nodes: int | None) -> Options:
    """The options of `drafters`, those left out that the rule or the width of a strict pass forbids.

    Args:
        drafters: their own depth is the most that is planned. most_nodes: drafted tokens a pass has room for.

    Raises:
        UnsupportedArgumentError: nothing is left, with the reason.
    """
    options: list[Option] = []
    refused: list[str] = []
    for drafter in drafters:
        option = _option(drafter, [other.name for other in options])
        why = None if rule == "auto" or drafter.kind is None else make_rule(rule).refusal(drafter.kind)
        if why is None and most_nodes is not None and drafter.max_nodes > most_nodes:
            why = f"{option.name} drafts up to {drafter.max_nodes} tokens, a strict pass has room for {most_nodes}"
        if why is None:
            options.append(option)
        else:
            refused.append(why)
    if not options:
        raise UnsupportedArgumentError("draft: expected at least one usable drafter; " + "; ".join(refused))
    return Options(options)


def _option(drafter: Drafter, taken: Sequence[str]) -> Option:
    chain = drafter.kind is not None and drafter.kind.shape == "chain"
    name = drafter.name
    if isinstance(drafter, ModelDrafter) and isinstance(drafter.shape, BestFirst):
        name += f" tree of {drafter.max_nodes}"
    while name in taken:
        name += "'"
    empty = isinstance(drafter, NgramDrafter)
    return Option(name, name, drafter, (1,) * drafter.max_depth, chain, empty, drafter.num_positions)


def planned_shapes(drafter: Drafter, most_nodes: int | None, fetches: bool) -> list[Drafter]:
    """What the planner chooses from where a user names a drafter and no length.

    Args:
        most_nodes: see `make_options`. fetches: whether the target's passes fetch weights.
    """
    shapes = [longest_chain(drafter, most_nodes)]
    if fetches and isinstance(drafter, ModelDrafter) and not drafter.shares_target_kv:
        shapes += [drafter.shaped(tree=tree) for tree in LARGE_TREES]
    return shapes


def longest_chain(drafter: Drafter, most_nodes: int | None) -> Drafter:
    """The chains the planner may cut short where a user names a drafter and no length."""
    if isinstance(drafter, ModelDrafter):
        return drafter.shaped(k=min(MODEL_DEPTH, most_nodes or MODEL_DEPTH))
    if isinstance(drafter, NgramDrafter):
        return NgramDrafter(k=min(NGRAM_DEPTH, most_nodes or NGRAM_DEPTH))
    return drafter
