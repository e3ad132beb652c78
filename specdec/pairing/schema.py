"""The format of a pair: frozen dataclasses, one per table of the file (docs/pairs.md shows a whole file)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SCHEMA = 1
"""Version of the format; a file says which one it is written in."""

KINDS = ("model", "ngram", "suffix", "self", "eagle", "eagle3")
"""What can draft. specdec itself runs the first four; heads are listed for exports and estimates."""
RUNNABLE = ("model", "ngram", "suffix", "self")
WITHOUT_MODEL = ("ngram", "suffix", "self")
"""Those that need no model but the target."""
RULES = (
    "auto", "greedy", "rejection", "block", "naive", "recursive_rejection", "traversal", "budget_flow", "coupled",
    "typical",
)  # fmt: skip
"""Acceptance rules by name (a test holds this to the registry, which imports torch)."""
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
VOCABULARIES = ("shared", "different")
DEFAULT_LENGTHS = {"model": 4, "ngram": 10, "suffix": 10, "self": 4, "eagle": 4, "eagle3": 4}
"""Tokens drafted per step where a pair does not say and nothing measures: what exports write down."""
NGRAM_MAX = 3
"""Longest n-gram looked up; the library's default."""
MOST_NODES, MOST_THREADS = 1024, 1024
"""Drafted tokens per step, and threads of a command (a test holds these to `kv/limits.py`, which imports torch)."""
MOST = 10**15
"""Any number about a model, a device or a published measurement."""


def home_expanded(path: Path) -> Path:
    """`path` with `~` replaced; as it is where nobody lives there."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def nodes_of_widths(widths: tuple[int, ...]) -> int:
    """Drafted tokens of a tree with so many children per level; counting ends beyond MOST_NODES."""
    total, level = 0, 1
    for width in widths:
        level *= width
        total += level
        if total > MOST_NODES:
            break
    return total


@dataclass(frozen=True)
class Facts:
    """What is known about one model, as its config.json has it.

    architecture: config.json's `model_type`. num_parameters: weights, tied embeddings counted once.
    num_step_parameters: weights that one decode pass reads; by default all but an embedding table that is not tied.
    vocab_size: rows of the embedding, padding included. draft_vocab_size: of a head that predicts only so many ids.
    source: where these numbers are from. unchecked: why any of them is not certain (empty: they are).
    """

    architecture: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    source: str
    num_step_parameters: int | None = None
    draft_vocab_size: int | None = None
    unchecked: str = ""

    @property
    def step_parameters(self) -> int:
        """Weights read by a pass over a few tokens; an embedding table is looked up, not read."""
        if self.num_step_parameters is not None:
            return self.num_step_parameters
        return self.num_parameters - (0 if self.tied_embeddings else self.vocab_size * self.hidden_size)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the K/V cache keeps per token; times two they are bytes in half precision."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class Target:
    """A model: a hub id (`model`), a folder (`path`, relative to the pair's file) or an installed Python package that
    brings its GGUF file (`package`); exactly one of them.

    revision: branch, tag or commit on the hub; version of a package. licence: as its card names it. gated: needs an
    accepted licence. gguf_file: name of a GGUF file there that holds its weights and tokenizer (`transformers` widens
    the weights).
    """

    model: str | None = None
    path: str | None = None
    revision: str | None = None
    licence: str = ""
    gated: bool = False
    facts: Facts | None = None
    gguf_file: str | None = None
    package: str | None = None


@dataclass(frozen=True)
class Draft:
    """What drafts: the fields of Target, and `kind` (one of KINDS). N-grams and the target itself have no model.

    form: of the target drafting for itself, e.g. "int8"; None leaves it to the planner.
    """

    kind: str
    model: str | None = None
    path: str | None = None
    revision: str | None = None
    licence: str = ""
    gated: bool = False
    facts: Facts | None = None
    gguf_file: str | None = None
    form: str | None = None

    @property
    def word(self) -> str | None:
        """What the library calls a drafter without a model, e.g. "self:int8"; None for one with a model."""
        if self.kind not in WITHOUT_MODEL:
            return None
        return self.kind if self.form is None else f"{self.kind}:{self.form}"

    @staticmethod
    def named(word: str) -> Draft | None:
        """The drafter of such a word; None for any other."""
        kind, colon, form = word.partition(":")
        if kind not in WITHOUT_MODEL or (colon and kind != "self"):
            return None
        return Draft(kind, form=form if colon else None)

    package: str | None = None


@dataclass(frozen=True)
class Drafting:
    """How it drafts. Without `k` and `tree` the library chooses by itself.

    k: tokens per step, as a chain. tree: children per level, e.g. [3, 2, 1]. rule: acceptance rule.
    suggested_k: what exports write for engines that cannot choose by themselves.
    """

    k: int | None = None
    tree: tuple[int, ...] | None = None
    rule: str = "auto"
    suggested_k: int | None = None


@dataclass(frozen=True)
class Published:
    """A published measurement of this pair.

    speedup: over plain decoding. tokens_per_pass: mean acceptance length, the target's own token included (None: not
    published). depth: draft passes per step. nodes: drafted tokens verified per step. launch: "eager" or "graphs".
    weight_bits: of both models. assumed: which of these the source does not state.
    """

    speedup: float
    source: str
    what: str
    device: str
    depth: int
    nodes: int
    tokens_per_pass: float | None = None
    num_devices: int = 1
    parallel: bool = True
    launch: str = "graphs"
    weight_bits: float = 16.0
    temperature: float = 0.0
    assumed: str = ""


@dataclass(frozen=True)
class Pair:
    """A target and what drafts for it.

    dtype: of both models on an accelerator (on a CPU the library uses float32 unless told otherwise).
    vocabulary: "shared" (one tokenizer; embeddings may be padded differently) or "different".
    folder: where the file lies; relative paths start there. None for a pair that came from no file.
    """

    name: str
    summary: str
    target: Target
    draft: Draft
    drafting: Drafting = Drafting()
    dtype: str = "bfloat16"
    vocabulary: str = "shared"
    published: tuple[Published, ...] = ()
    schema: int = SCHEMA
    folder: Path | None = None

    def location(self, part: Target | Draft) -> str:
        """Hub id, absolute folder or package of `part`."""
        if part.path is not None:
            return str(home_expanded((self.folder or Path()) / part.path).resolve())
        return part.model or part.package or ""

    @property
    def draft_length(self) -> int:
        """Tokens per chain for engines that must be told a number; the depth of a tree."""
        if self.drafting.tree is not None:
            return len(self.drafting.tree)
        return self.drafting.k or self.drafting.suggested_k or DEFAULT_LENGTHS[self.draft.kind]

    @property
    def num_nodes(self) -> int:
        """Drafted tokens per step: the draft length of a chain, all nodes of a tree."""
        return self.draft_length if self.drafting.tree is None else nodes_of_widths(self.drafting.tree)
