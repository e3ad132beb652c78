"""Captured passes: static buffers give what eager passes give, and a recording of their operations can be replayed.

On a CPU `make_fx` stands in for CUDA graph capture: it records the operations of one run on the very buffers, not
what the host does with their values, and replays them on whatever the buffers hold later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from ways import graphed_forward

import specdec
from specdec.drafters import BestFirst
from specdec.kv import SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Forward, Topology
from specdec.verify.attention.choose import VARIABLE
from specdec.verify.passes import graphed
from specdec.verify.passes.graphed import Run, bucket_slots, bucket_width

TREE = Topology((-1, 0, 0, 1, 1, 2))
FAMILIES = ["llama-gqa", "qwen2-mixed-window", "mistral-window", "gpt2", "qwen3"]


def record(run: Run) -> Run:
    """Record a run as a graph of tensor operations; a value taken to the host raises while recording."""

    def plainly() -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():
            return run()

    with torch.inference_mode(False), torch.no_grad():
        traced: Run = make_fx(plainly)()
    return lambda: tuple(tensor.clone() for tensor in traced())


def pair_of(
    family: str, capture: Callable[[Run], Run] | None, rows: int = 2, min_uses: int = 1, capacity: int = 64
) -> tuple[list[SharedKVCache], list[Forward]]:
    """Two caches with the same prompts: one for eager passes, one for captured ones."""
    model = models.target(family)
    text = torch.randint(3, models.VOCAB, (rows, 30), generator=torch.Generator().manual_seed(0))
    caches = [SharedKVCache({"t": num_cache_layers(model)}, rows, capacity) for _ in range(2)]
    forwards = [Forward(model, "t"), graphed_forward(model, "t", capture, min_uses)]
    stops = [9, 4, 17][:rows]
    for cache, forward in zip(caches, forwards, strict=True):
        with forward.prepared():
            forward.prefill(cache, text, [0] * rows, stops, 2048)
        for row, stop in enumerate(stops):
            cache.set_length(row, stop)
    return caches, forwards


def compare(caches: list[SharedKVCache], forwards: list[Forward], topology: Topology, path: list[int]) -> None:
    """One step on both sides: the same logits, the same K/V."""
    rows = caches[0].num_rows
    tokens = torch.randint(3, models.VOCAB, (rows, topology.num_nodes), generator=torch.Generator().manual_seed(rows))
    found = []
    for cache, forward in zip(caches, forwards, strict=True):
        with forward.prepared():
            found.append(forward.tree(cache, DraftTree.build(topology, tokens)).logits)
        cache.commit([path] + [[0]] * (rows - 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    for row in range(rows):
        for eager, static in zip(caches[0].layers("t", row), caches[1].layers("t", row), strict=True):
            torch.testing.assert_close(static, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_recording_serves_every_later_step(family: str) -> None:
    """Other tokens, other lengths, moved K/V: everything a replay needs is in its buffers."""
    caches, forwards = pair_of(family, record)
    captured: Any = forwards[1].runners[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in ([0, 2, 5], [0], [0, 1, 4]):
            compare(caches, forwards, TREE, path)
    assert captured.num_replays == 3
    assert len(captured._graphs) == 1


@pytest.mark.parametrize("backend", ["fold", "split"])
def test_with_any_attention_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, backend)
    caches, forwards = pair_of("llama-gqa", record, rows=3)
    for topology in (TREE, Topology.chain(0)):
        compare(caches, forwards, topology, [0])
    captured: Any = forwards[1].runners[0]
    assert sorted(shape.width for shape in captured._graphs) == [1, 8]


def test_earlier_nodes_of_the_tree_are_seen() -> None:
    """A drafter runs level after level: the second one attends to the first, which is in the tail."""
    caches, forwards = pair_of("llama-gqa", record)
    depths, ancestors = TREE.depths_on(torch.device("cpu")).expand(2, -1), TREE.ancestor_mask.expand(2, -1, -1)
    tokens = torch.arange(3, 15).view(2, 6)
    found = []
    for cache, forward in zip(caches, forwards, strict=True):
        with forward.prepared():
            forward.nodes(cache, tokens[:, :3], depths[:, :3], ancestors[:, :3, :3], 0)
            found.append(forward.nodes(cache, tokens[:, 3:], depths, ancestors[:, 3:], 3).logits)
            cache.rollback()
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert forwards[1].runners[0].num_replays == 2  # type: ignore[attr-defined]


def test_a_replay_of_stale_buffers_would_be_noticed() -> None:
    """The negative control: a capture that replays its first result."""

    def stale(run: Run) -> Run:
        first = run()
        return lambda: first

    caches, forwards = pair_of("llama-gqa", stale)
    compare(caches, forwards, TREE, [0, 2, 5])
    with pytest.raises(AssertionError, match="not close"):
        compare(caches, forwards, TREE, [0])


def test_a_shape_is_captured_when_it_comes_again() -> None:
    calls: list[int] = []

    def counting(run: Run) -> Run:
        calls.append(1)
        return run

    caches, forwards = pair_of("llama-gqa", counting, min_uses=3)
    for expected in (0, 0, 1, 1):
        compare(caches, forwards, TREE, [0])
        assert len(calls) == expected


def test_graphs_of_storage_that_moved_are_dropped() -> None:
    caches, forwards = pair_of("llama-gqa", None, capacity=24)
    captured: Any = forwards[1].runners[0]
    compare(caches, forwards, TREE, [0])
    (old,) = captured._graphs
    while old in captured._graphs:
        compare(caches, forwards, TREE, [0, 2, 5])
    assert captured.num_replays > 3
    assert all(shape.storage != old.storage for shape in captured._graphs)


def test_a_model_that_cannot_be_captured_runs_eagerly() -> None:
    def refusing(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    caches, forwards = pair_of("llama-gqa", refusing)
    with pytest.warns(RuntimeWarning, match="cannot be captured and run eagerly: operation not permitted"):
        compare(caches, forwards, TREE, [0, 2, 5])
    compare(caches, forwards, TREE, [0])
    assert forwards[1].runners[0].num_replays == 0  # type: ignore[attr-defined]


def test_a_recording_does_not_follow_values_on_the_host() -> None:
    """The stand-in is worth something: what a CUDA graph could not follow, it does not follow either."""
    buffer = torch.ones(3)

    def looks(run: Run) -> bool:
        buffer.fill_(1.0)
        try:
            replay = record(run)
        except RuntimeError as refusal:
            assert "data-dependent" in str(refusal)  # noqa: PT017
            return True
        buffer.fill_(2.0)
        return not torch.equal(replay()[0], run()[0])

    assert not looks(lambda: (buffer * buffer.sum(),))
    assert looks(lambda: (buffer * float(buffer.sum()),))


def test_out_of_memory_is_passed_on() -> None:
    """The loop answers it by dropping the draft; it must not be taken for a model that cannot be captured."""

    def hungry(run: Run) -> Run:
        raise torch.OutOfMemoryError("no memory")

    caches, forwards = pair_of("llama-gqa", hungry)
    before = caches[1].filled("t")
    with pytest.raises(torch.OutOfMemoryError), forwards[1].prepared():
        forwards[1].tree(caches[1], DraftTree.build(TREE, torch.full((2, 6), 5)))
    assert caches[1].filled("t") == before


@pytest.mark.parametrize(("nodes", "width"), [(1, 1), (2, 2), (3, 4), (17, 32), (128, 128), (129, None)])
def test_widths(nodes: int, width: int | None) -> None:
    assert bucket_width(nodes) == width


@pytest.mark.parametrize(
    ("slots", "capacity", "bucket"), [(3, 4096, 512), (512, 4096, 512), (513, 4096, 1024), (900, 1000, 1000)]
)
def test_slots(slots: int, capacity: int, bucket: int) -> None:
    assert bucket_slots(slots, capacity) == bucket


@pytest.mark.parametrize(
    ("lengths", "drafting"),
    [((7,), {"k": 3}), ((7, 3, 5), {"tree": (2, 2, 1)}), ((5, 5), {"tree": BestFirst(3, 2, 5)})],
    ids=["chain", "ragged tree", "best first"],
)
@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampled"])
def test_generate_writes_the_same_text(
    lengths: tuple[int, ...], drafting: dict[str, Any], sampling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target and drafter on static buffers through the whole loop, batches that shrink included."""
    target = models.target("llama-gqa")
    draft = models.draft("near", "llama-gqa")
    ids, mask = models.prompts(lengths, models.VOCAB, 0)
    arguments: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=20, do_sample=sampling, pad_token_id=0)
    if sampling:
        arguments["seed"] = 3
    expected = specdec.Speculator(target, draft, **drafting).generate(ids, **arguments)
    made: list[Any] = []

    def static(model: Any) -> Any:
        made.append(graphed_forward(model, "", None, 1).runners)
        return made[-1]

    monkeypatch.setattr("specdec.verify.passes.forward.runners_for", static)
    monkeypatch.setattr(graphed, "MIN_SLOTS", 32)
    out = specdec.Speculator(target, draft, **drafting).generate(ids, **arguments)
    assert torch.equal(torch.as_tensor(out), torch.as_tensor(expected))
    assert len(made) == 2
    assert all(runners[0].num_replays > 2 for runners in made)
