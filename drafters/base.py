"""The drafter contract. A drafter can cost speed, never the output: rules need only what it really sampled from."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specdec.kv.base import KVCache
from specdec.verify.draft_kind import DraftKind
from specdec.verify.rows import Rows
from specdec.verify.tree import DraftTree, Verdict


@dataclass(frozen=True)
class Budget:
    """What the next tree may cost, per live row. Depth 0 = decode that row plainly.

    depths: most levels below the root for each live row. A row's tree must depend on its own entry only, or its
        text would depend on the rows around it.
    max_nodes: most drafted tokens per row.
    """

    depths: tuple[int, ...]
    max_nodes: int

    @property
    def max_depth(self) -> int:
        return max(self.depths, default=0)


def depth_limits(deepest: int, left: Sequence[int | None]) -> tuple[int, ...]:
    """Most useful levels of each row's draft.

    A row emits one token more than it accepts, so the last token of its limit needs no draft.

    Args:
        left: tokens each row may still emit, None without a limit.
    """
    return tuple(deepest if tokens is None else max(0, min(deepest, tokens - 1)) for tokens in left)


def levels_within(positions: int | None, deepest: int, num_tokens: int) -> int:
    """Levels (at most `deepest`) that a drafter can draft below `num_tokens` tokens when it can read `positions`."""
    return deepest if positions is None else max(0, min(deepest, positions + 1 - num_tokens))


class NodeLaw(Protocol):
    """Logits of tree nodes -> processed scores: a `SamplingLaw`, or one law for each row (an engine's)."""

    @property
    def prefix_free(self) -> bool:
        """Whether no processor reads the text before a node."""

    @property
    def raw(self) -> bool:
        """Whether scores are the logits as they are."""

    def __call__(
        self,
        logits: Tensor,
        rows: Rows,
        tokens: Tensor,
        parents: Tensor,
        nodes: range,
        impossible: Tensor | None = None,
    ) -> Tensor:
        """See `SamplingLaw`."""


@dataclass(frozen=True)
class Session:
    """What a drafter may look at during one `generate` call. It must not change any of it but its own K/V.

    rows: the running text; `rows.live` maps active storage rows to rows of the batch.
    cache: the shared cache; the drafter's own storage in it is called `CACHE_NAME`.
    law: logits -> scores, with the caller's processors.
    do_sample: False means greedy decoding: only the target's argmax will be accepted.
    vocab: the target's vocabulary size; drafted ids must be below it and q rows that wide.
    race: only with rule "coupled", where a race decides on the target's tokens: `race(depths)` is the noise of the next
        `depths` positions of each live row, float64 `[live, depths, vocab]`, first that of the token after the root.
        A drafter that runs the same race under its own law (`specdec.verify.race`) proposes the target's token as
        often as it can. It need not return q.
    """

    rows: Rows
    cache: KVCache
    law: NodeLaw
    do_sample: bool
    vocab: int
    race: Callable[[int], Tensor] | None = None


CACHE_NAME = "draft"
"""The drafter's name in the shared cache."""


class Drafter(ABC):
    """Proposes a tree for every live row, each step.

    Call order: `start`, then per step `propose` and `observe` (also after a faulty or empty proposal), `stop` for
    rows that finish, and finally `finish`, also after an error. Between steps rows may `join`: a session may begin
    without any row and go on for as long as an engine runs. After `observe` the drafter's state agrees with the
    emitted tokens in `session.rows`.

    Exactness: the decision to draft or keep a *sampled* token may depend on the text before it, on q and on time,
    never on the token itself or later ones (algorithms B.5). Deterministic tokens may be chosen freely, but not by
    sampled ones that are judged after them.
    """

    name: str = "drafter"
    max_depth: int
    """Depth of the trees it proposes when the budget allows."""
    max_nodes: int
    """Most drafted tokens it proposes per row."""
    notes: Sequence[str] = ()
    """What the user should know about the drafts of the call at hand, though nothing failed: the first is a warning,
    all of them are in the report."""

    @property
    def num_positions(self) -> int | None:
        """Tokens of a row that it can read; None without such a limit."""
        return None

    @property
    def looks_ahead(self) -> bool:
        """Whether nodes are withdrawn after a look at deeper ones. Under rule coupled deeper nodes show noise of later
        positions. The text stays the same, but where a step ends then depends on the token after it."""
        return False

    @property
    def kind(self) -> DraftKind | None:
        """What its drafts are like in calls that sample: rules are chosen and refused by it before anything runs.
        None: anything; each tree is then looked at when it comes."""
        return None

    @property
    def num_uniforms(self) -> int:
        """Uniforms per row and step that `propose` may look at."""
        return self.max_nodes + 1

    @property
    def tail_slots(self) -> int:
        """Slots behind a row's text that `propose` and the pass over its tree may write, the root's included."""
        return self.max_nodes + 1

    def nodes_within(self, depth: int) -> int:
        """Most drafted tokens per row of a tree cut to `depth` levels."""
        return self.max_nodes if self.max_nodes > self.max_depth else min(depth, self.max_nodes)

    @property
    def num_cache_layers(self) -> int:
        """Layers of storage it needs in the shared cache; 0 when it keeps no K/V."""
        return 0

    @property
    def shares_target_kv(self) -> bool:
        """Whether its K/V are the target's own, behind which it writes no more than its tail (see `KVCache`)."""
        return False

    @property
    def keeps_kv(self) -> bool:
        """Whether it has K/V of its own, which must catch up with the text."""
        return self.num_cache_layers > 0 and not self.shares_target_kv

    def running(self) -> AbstractContextManager[object]:
        """Entered around a whole call, before `start`: what the drafter needs set up while it may be asked."""
        return nullcontext()

    @abstractmethod
    def start(self, session: Session) -> None:
        """A new `generate` call begins; forget everything about the last one."""

    @abstractmethod
    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        """A tree for each live row, rooted at its last emitted token.

        Args:
            uniforms: float64 `[live, num_uniforms]` in [0, 1), fresh, the only randomness to use.
        """

    def observe(self, verdict: Verdict, logits: Tensor) -> None:  # noqa: B027 - optional hook, not an abstract duty
        """The step's outcome. Called after the emitted tokens are in `rows` and the cache is committed.

        Args:
            logits: the target's raw logits `[live before the step, nodes, vocab]`.
        """

    def join(self, rows: Sequence[int]) -> None:  # noqa: B027 - optional hook, not an abstract duty
        """These rows of the batch have become live (at the end of `session.rows.live`), between two steps. Their index
        may be that of a row that was stopped; their text may be longer than a prompt."""

    def stop(self, rows: Sequence[int]) -> None:  # noqa: B027 - optional hook, not an abstract duty
        """These rows of the batch are finished; drop what is kept for them."""

    def finish(self) -> None:  # noqa: B027 - optional hook, not an abstract duty
        """The call is over, well or not: let go of the session, which holds the call's K/V."""

    def clone(self) -> Drafter:
        """A drafter of the same settings (and models) for another session at the same time.

        A shallow copy will do for every drafter whose `start` makes its state anew; others must override this.
        """
        return copy.copy(self)
