"""One way to draft, and to decode, as a word: `model:k=4`, `model:tree=3,2,1:children=sampled`, `ngram:k=6`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, Literal

from specdec.shown_errors import ExperimentError

CHILDREN = ("mixed", "top", "sampled")
_FIELDS = {
    "none": (),
    "model": ("k", "tree", "children"),
    "ngram": ("k", "branches"),
    "self": ("form", "k", "tree", "children"),
    "best-first": ("depth", "top_k", "num_nodes"),
}
EXAMPLES = (
    "none, model:k=4, model:tree=3,2,1:children=sampled, ngram:k=6, self:int8:k=4, "
    "best-first:depth=4:top_k=4:num_nodes=15"
)

COMPARED: dict[tuple[str, str], tuple[str, ...]] = {
    ("chain", "sampled"): ("block", "rejection", "coupled", "naive"),
    ("chain", "deterministic"): ("naive", "rejection", "coupled"),
    ("tree", "deterministic"): ("naive", "traversal", "coupled"),
    ("tree", "mixed"): ("budget_flow", "traversal", "recursive_rejection", "naive", "coupled"),
    ("tree", "sampled"): ("traversal", "recursive_rejection", "naive", "coupled"),
}
"""Lossless rules that take drafts of a shape and node kind, the one that "auto" takes first."""


@dataclass(frozen=True)
class Setting:
    """A drafter and its shape.

    kind: "none" (plain decoding), "model", "ngram", "self" (the target itself) or "best-first". fields: its options as
    (name, value) pairs.
    """

    kind: str
    fields: tuple[tuple[str, int | str | tuple[int, ...]], ...] = ()

    @staticmethod
    def parse(text: str) -> Setting:
        """The setting a word means.

        Example: `Setting.parse("model:tree=2,1:children=top").widths == (2, 1)`.

        Raises:
            ExperimentError: an unknown kind or option, or a malformed value.
        """
        kind, *parts = text.strip().split(":")
        if kind not in _FIELDS:
            raise ExperimentError(f"setting: expected one like {EXAMPLES}; got {text!r}")
        fields: dict[str, Any] = {}
        if kind == "self":
            if not parts or "=" in parts[0]:
                raise ExperimentError(f"setting {text!r}: expected the form of the target first, as in self:int8:k=4")
            fields["form"] = parts.pop(0)
        for part in parts:
            name, _, value = part.partition("=")
            if name not in _FIELDS[kind] or name in fields:
                raise ExperimentError(
                    f"setting {text!r}: {name!r} is no option of {kind}, or comes twice; expected some of "
                    f"{', '.join(_FIELDS[kind]) or 'none'}"
                )
            fields[name] = _value(text, name, value)
        if "k" in fields and "tree" in fields:
            raise ExperimentError(f"setting {text!r}: expected k or tree, got both (k=3 is tree=1,1,1)")
        if "children" in fields and "tree" not in fields:
            raise ExperimentError(f"setting {text!r}: children belongs to tree=")
        return Setting(kind, tuple(fields.items()))

    def __str__(self) -> str:
        shown = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in self.fields}
        form = [str(shown.pop("form"))] if "form" in shown else []
        return ":".join([self.kind, *form, *(f"{name}={value}" for name, value in shown.items())])

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.fields).get(name, default)

    @property
    def needs_model(self) -> bool:
        """Whether a draft model drafts."""
        return self.kind in ("model", "best-first")

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Children per level of static shapes (a chain of k is k ones), None for others."""
        return self.get("tree", (1,) * self.get("k", 4)) if self.kind in ("model", "self") else None

    @property
    def mode(self) -> str:
        """How children of sampled calls are chosen: a "chain" samples its one child."""
        widths = self.widths
        if widths is not None and max(widths) == 1 and "children" not in dict(self.fields):
            return "chain"
        return str(self.get("children", "mixed"))

    @property
    def shape_kind(self) -> tuple[Literal["chain", "tree"], str]:
        """Shape and node kind of what it drafts when sampling (see `verify.kinds.DraftKind`)."""
        if self.kind == "best-first":
            return "tree", "deterministic"
        if self.kind == "ngram":
            return ("chain" if self.get("branches", 1) == 1 else "tree"), "deterministic"
        if self.widths is not None and max(self.widths) == 1:
            return "chain", "deterministic" if self.mode == "top" else "sampled"
        return "tree", {"top": "deterministic"}.get(self.mode, self.mode)

    def rules(self, temperature: float) -> tuple[str, ...]:
        """Rules worth comparing at a temperature: all agree on "greedy" at 0; plain decoding has none."""
        if temperature == 0:
            return ("greedy",)
        return ("auto",) if self.kind == "none" else COMPARED[self.shape_kind]

    @property
    def num_nodes(self) -> int:
        """Drafted tokens per step, at most."""
        if self.kind == "ngram":
            return int(self.get("k", 10)) * int(self.get("branches", 1))
        if self.kind == "best-first":
            return int(self.get("num_nodes", 60))
        return sum(accumulate(self.widths or (), mul))

    @property
    def num_levels(self) -> int:
        """Passes of the draft model per step, at most; n-grams need none."""
        return int(self.get("depth", 7)) if self.kind == "best-first" else len(self.widths or ())

    def build(self, draft: Any, target: Any = None) -> Any:
        """The Drafter (None for "none"). Imports torch.

        Args:
            draft: the draft model; only "model" and "best-first" look at it. target: only "self" does.
        """
        from specdec.drafters import BestFirst, ModelDrafter, NgramDrafter, SelfDrafter

        fields: dict[str, Any] = dict(self.fields)
        if self.kind == "none":
            return None
        if self.kind == "ngram":
            return NgramDrafter(**fields)
        if self.kind == "self":
            return SelfDrafter(target, **fields)
        if draft is None:
            raise ExperimentError(f"setting {self}: needs a draft model; give --pair or --draft")
        if self.kind == "best-first":
            return ModelDrafter(draft, tree=BestFirst(**fields))
        if "tree" in fields:
            return ModelDrafter(draft, tree=fields["tree"], children=self.get("children"))
        return ModelDrafter(draft, k=self.get("k", 4))


def _value(text: str, name: str, value: str) -> int | str | tuple[int, ...]:
    if name == "children":
        if value not in CHILDREN:
            raise ExperimentError(f"setting {text!r}: children: expected one of {CHILDREN}, got {value!r}")
        return value
    parts = value.split(",") if name == "tree" else [value]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ExperimentError(f"setting {text!r}: {name}: expected numbers >= 1, got {value!r}")
    numbers = tuple(int(part) for part in parts)
    return numbers if name == "tree" else numbers[0]


PLAIN = Setting("none")


@dataclass(frozen=True)
class Cell:
    """One way to decode. Its text is its key in result files."""

    setting: Setting
    rule: str
    temperature: float

    def __str__(self) -> str:
        return f"{self.setting} | {self.rule} | T={self.temperature:g}"

    @property
    def is_plain(self) -> bool:
        return self.setting == PLAIN

    @staticmethod
    def parse(key: str) -> Cell:
        """The inverse of `str`."""
        setting, rule, temperature = key.split(" | ")
        return Cell(Setting.parse(setting), rule, float(temperature.removeprefix("T=")))
