"""Cases of tree attention and the judgement of a backend's result, shared by all backends' tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from oracle.tree_attention import reference_attention
from torch import Tensor

from specdec.verify.attention.fold import fold_attention
from specdec.verify.attention.plan import TreePlan

EPS = {torch.float64: 1e-15, torch.float32: 2.4e-7, torch.bfloat16: 7.8e-3, torch.float16: 9.8e-4}
"""Twice the relative rounding error of each dtype (float64: an order above it)."""


@dataclass(frozen=True)
class AttentionCase:
    """One shape. `tree`: chain, star, comb (a chain with a leaf at every node) or random (another one per row)."""

    lengths: tuple[int, ...]
    nodes: int
    tree: str = "random"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int | None = None
    page: int = 0
    window: int | None = None
    first: int = 0
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        parts = [f"{'-'.join(map(str, self.lengths))}x{self.nodes}{self.tree}", f"{self.heads}:{self.kv_heads}"]
        parts += [f"d{self.head_dim}" + (f"-{self.value_dim}" if self.value_dim else "")]
        parts += [f"{name}{value}" for name, value in (("page", self.page), ("window", self.window)) if value]
        parts += [f"first{self.first}"] if self.first else []
        return ",".join([*parts, str(self.dtype).removeprefix("torch.")])


@dataclass(frozen=True)
class States:
    """What a backend is given. Slots that no node may see, and the pages of nobody, hold NaN or huge values."""

    query: Tensor
    key: Tensor
    value: Tensor
    plan: TreePlan
    scale: float
    window: int | None

    def reference(self) -> Tensor:
        return reference_attention(self.query, self.key, self.value, self.plan, self.scale, self.window)


def parents_of(kind: str, nodes: int, generator: torch.Generator) -> list[int]:
    if kind == "chain":
        return list(range(-1, nodes - 1))
    if kind == "star":
        return [-1] + [0] * (nodes - 1)
    if kind == "comb":
        return [-1] + [(i - 1) // 2 * 2 if i % 2 else i - 2 for i in range(1, nodes)]
    assert kind == "random", kind
    return [-1] + [int(torch.randint(i, (), generator=generator)) for i in range(1, nodes)]


def ancestors_of(parents: list[int]) -> tuple[Tensor, Tensor]:
    """`(bool [nodes, nodes], int32 depths [nodes])`."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask, (mask.sum(1) - 1).to(torch.int32)


def states(case: AttentionCase, device: str = "cpu", seed: int = 0) -> States:
    """Random states; the tail of every row lies behind its committed slots, the rest of the storage is poisoned."""
    generator = torch.Generator().manual_seed(seed + 31 * case.nodes + sum(case.lengths))
    rows, tail = len(case.lengths), case.first + case.nodes
    trees = [ancestors_of(parents_of(case.tree, tail, generator)) for _ in range(1 if case.tree != "random" else rows)]
    ancestors = torch.stack([mask[case.first :] for mask, _ in trees])
    depths = torch.stack([depth for _, depth in trees])
    longest = max(case.lengths)
    value_dim = case.value_dim or case.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    # As models make them: heads split off a [rows, nodes, hidden] product.
    query = normal(rows, case.nodes, case.heads, case.head_dim).transpose(1, 2)
    capacity = longest + tail + 5
    key = torch.full((rows, case.kv_heads, capacity, case.head_dim), float("nan"), dtype=case.dtype)
    value = torch.full((rows, case.kv_heads, capacity, value_dim), float("nan"), dtype=case.dtype)
    for row, length in enumerate(case.lengths):
        used = length + tail
        key[row, :, :used] = normal(case.kv_heads, used, case.head_dim)
        value[row, :, :used] = normal(case.kv_heads, used, value_dim)
    table = None
    if case.page:
        key, value, table = _paged(key, value, case, tail, generator)
    plan = TreePlan(
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        ancestors.to(device),
        depths.to(device),
        longest,
        equal=len(set(case.lengths)) == 1,
        table=None if table is None else table.to(device),
    )
    # The layout is kept: copies between devices would keep it, too.
    return States(
        query.to(device), key.to(device), value.to(device), plan, 0.7 * case.head_dim**-0.5, case.window
    )  # fmt: skip


def clean(given: States) -> States:
    """With zeros for poison: masked SDPA multiplies what it hides by zero, so it must be finite (as in the cache)."""
    return replace(given, key=given.key.nan_to_num(0.0), value=given.value.nan_to_num(0.0))


def _paged(
    key: Tensor, value: Tensor, case: AttentionCase, tail: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The same K/V in shuffled pages; page 0 belongs to nobody and is NaN, as is what rows do not fill."""
    rows, size = key.shape[0], case.page
    counts = [-(-(length + tail) // size) for length in case.lengths]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    table = torch.zeros(rows, max(counts), dtype=torch.int32)
    pages = []
    for states in (key, value):
        # Stored [pages, page_size, kv_heads, dim], seen through a transposed view: strides must be honoured.
        shape = (sum(counts) + 1, size, case.kv_heads, states.shape[3])
        pages.append(torch.full(shape, float("nan"), dtype=states.dtype).transpose(1, 2))
    for row in range(rows):
        for i in range(counts[row]):
            page = table[row, i] = order.pop()
            for states, store in zip((key, value), pages, strict=True):
                part = states[row, :, i * size : min((i + 1) * size, case.lengths[row] + tail)]
                store[int(page), :, : part.shape[1]] = part
    return pages[0], pages[1], table


def sdpa_error(given: States) -> float:
    """The error of masked SDPA on the same numbers, with nothing hidden that could spoil it."""
    tidy = clean(given)
    out = fold_attention(tidy.query, tidy.key, tidy.value, tidy.plan, tidy.scale, tidy.window)
    return float((out.double() - given.reference()).abs().max())


def complaint(given: States, out: Tensor, factor: float = 2.0) -> str | None:
    """Why `out` is not the attention of `given`: an error above `factor` times SDPA's own, or above rounding."""
    reference = given.reference()
    if out.shape != reference.shape:
        return f"shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    if out.dtype != given.query.dtype:
        return f"dtype {out.dtype}, expected {given.query.dtype}"
    if not out.isfinite().all():
        return "not finite: a slot out of sight was read"
    error = float((out.double() - reference).abs().max())
    allowed = factor * max(sdpa_error(given), EPS[given.query.dtype] * float(reference.abs().max()) / 2)
    return None if error <= allowed else f"error {error:.2e}, allowed {allowed:.2e}"
