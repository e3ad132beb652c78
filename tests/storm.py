"""A storm over one engine: requests of every kind from several threads at once, a tenth of them with faults planted."""

from __future__ import annotations

import copy
import random
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import models
import torch
from engine_cases import DRAFTERS, FAMILY, SETTINGS, Ask, alone
from engine_plants import PLANTS
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from specdec.drafters import Budget, ModelDrafter, NgramDrafter
from specdec.engine import Engine, Handle, RequestFaultError, Result
from specdec.engine.passes import EnginePasses
from specdec.engine.scheduler import Chunk
from specdec.kv import TargetFaultError
from specdec.verify import DraftTree

SICK = models.VOCAB - 1
"""A token whose embedding is NaN: whoever reads it has no law any more. Nobody healthy can emit it."""
HEAVY = models.VOCAB - 2
"""A token at which the target raises while it reads a prompt."""
NUM_CLIENTS = 4
GROUP = 10
"""Of so many requests one has a fault planted."""


class Counting(LogitsProcessor):
    """A healthy processor that keeps count of its calls: it must be called once per emitted token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.index_fill(1, torch.tensor([3 + self.calls % 5]), -20.0)


class Enough(StoppingCriteria):
    """A healthy criterion that counts as well."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.calls += 1
        return torch.tensor([self.calls >= 7])


class Unreliable(ModelDrafter):
    """Raises all there is to raise, or returns nonsense, now and then."""

    def __init__(self, seed: int):
        super().__init__(models.draft("near", FAMILY), k=4)
        self.rng = random.Random(seed)

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        tree = super().propose(budget, uniforms)
        luck = self.rng.random()
        if luck < 0.1:
            raise self.rng.choice([RuntimeError("boom"), SystemExit(1), GeneratorExit()])
        return DraftTree.build(tree.topology, tree.tokens + 1000) if luck < 0.2 else tree  # type: ignore[arg-type]


class Dead(NgramDrafter):
    """Cannot even be copied for a lane."""

    def clone(self) -> Any:
        raise OSError("gone")


@dataclass
class Planned:
    """One request of the storm. plant: a name of `PLANTS`, or what the target does to it; None for a healthy one."""

    ask: Ask
    options: dict[str, Any]
    plant: str | None = None
    cancel_after: float | None = None
    handle: Handle | None = None


def own_code(kind: str | None) -> dict[str, Any]:
    """Fresh healthy code, as every call of `generate` would get it."""
    if kind == "processor":
        return {"logits_processor": LogitsProcessorList([Counting()])}
    return {"stopping_criteria": StoppingCriteriaList([Enough()])} if kind == "criterion" else {}


@lru_cache(maxsize=4096)
def expected(ask: Ask, kind: str | None) -> list[int]:
    """What `Speculator.generate` gives for a healthy request by itself."""
    extra = {"suppress_tokens": [SICK], **own_code(kind)}
    return alone.__wrapped__(Ask(**{**ask.__dict__, "extra": extra}))[0]


class Storm:
    """Args: seed: of everything but the clock. count: requests."""

    def __init__(self, seed: int, count: int):
        rng = self.rng = random.Random(seed)
        target: Any = copy.deepcopy(models.target(FAMILY))
        with torch.no_grad():
            target.get_input_embeddings().weight[SICK] = float("nan")
        drafters = {name: make() for name, make in DRAFTERS.items() if name != "none"}
        self.engine = Engine(
            target, None, drafters={**drafters, "unreliable": Unreliable(seed), "dead": Dead(k=4)},
            num_pages=48, page_size=4, max_rows=6, max_step_tokens=64,
        )  # fmt: skip
        heads = [[rng.randrange(3, HEAVY) for _ in range(rng.randrange(5, 13))] for _ in range(3)]
        self.asks = [self._ask(heads) for _ in range(max(12, count // 6))]
        self.names = rng.sample([*PLANTS, "target gives nan", "target raises"], len(PLANTS) + 2)
        self.planned = [self._planned(i) for i in range(count)]
        self.errors: list[BaseException] = []

    def _ask(self, heads: list[list[int]]) -> tuple[Ask, str | None]:
        rng = self.rng
        setting = rng.randrange(len(SETTINGS))
        free = not SETTINGS[setting]["do_sample"] or SETTINGS[setting].get("rule") == "coupled"
        kind = rng.choice([None, None, None, "processor", "criterion"])
        names = [*DRAFTERS, *(["unreliable", "unreliable", "dead"] if free else [])]
        prompt = rng.choice([*heads, []]) + [rng.randrange(3, HEAVY) for _ in range(rng.randrange(1, 16))]
        return Ask(tuple(prompt), rng.choice(names), rng.randrange(2**60), rng.randrange(1, 18), setting), kind

    def _planned(self, i: int) -> Planned:
        rng = self.rng
        if i % GROUP == GROUP - 1:
            plant = self.names[i // GROUP % len(self.names)]
            prompt = [rng.randrange(3, HEAVY) for _ in range(rng.randrange(2, 9))]
            draft = rng.choice([*DRAFTERS])
            options: dict[str, Any] = {"do_sample": False, "seed": i, "eos_token_id": None, "pad_token_id": 0}
            options |= {"max_new_tokens": 14, "suppress_tokens": [SICK]}
            if plant in PLANTS:
                options |= PLANTS[plant](len(prompt) + rng.randrange(6))
            else:
                prompt.insert(rng.randrange(len(prompt) + 1), SICK if plant == "target gives nan" else HEAVY)
                prompt.append(5)  # what is read in the prefill, not the root of the first draft
            return Planned(Ask(tuple(prompt), draft, i, 14, 0), options, plant)
        ask, kind = rng.choice(self.asks)
        options = {**ask.options, "suppress_tokens": [SICK], "priority": rng.choice([0, 0, 0, 1, -1]), "kind": kind}
        if rng.random() < 0.06:
            options["timeout"] = rng.choice([1e-3, 0.02, 0.2])
        return Planned(ask, options, None, rng.random() * 0.05 if rng.random() < 0.08 else None)

    def run(self) -> None:
        """All of it, until every handle is done and the engine is closed."""
        self.engine.start()
        clients = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(NUM_CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(600)
            assert not client.is_alive(), "somebody waits for ever"
        self.engine.close()
        if self.errors:
            raise self.errors[0]

    def _client(self, number: int) -> None:
        try:
            rng = random.Random(number)
            mine = self.planned[number::NUM_CLIENTS]
            for first in range(0, len(mine), 5):
                group = mine[first : first + 5]
                for one in group:
                    options = dict(one.options)
                    code = own_code(options.pop("kind", None))
                    draft = one.ask.draft
                    one.handle = self.engine.submit(one.ask.prompt, draft=draft, **{**options, **code})
                    if one.cancel_after is not None:
                        threading.Timer(one.cancel_after, one.handle.cancel).start()
                if rng.random() < 0.8:
                    self._wait(group, rng)
                else:
                    time.sleep(rng.random() * 0.02)
            self._wait(mine, rng)
        except BaseException as fault:
            self.errors.append(fault)

    def _wait(self, group: list[Planned], rng: random.Random) -> None:
        for one in group:
            assert one.handle is not None
            try:
                if rng.random() < 0.5:
                    assert list(one.handle) == one.handle.token_ids
                else:
                    one.handle.result(300)
            except (RequestFaultError, TargetFaultError):
                assert one.plant is not None, one

    def check(self) -> dict[str, int]:
        """Every text, every error, every page and thread; returns counts by what became of the requests."""
        ends: dict[str, int] = {}
        for one in self.planned:
            assert one.handle is not None
            assert one.handle.done
            outcome = _outcome(one.handle)
            if one.plant is not None:
                kind = RequestFaultError if one.plant in PLANTS else TargetFaultError
                assert type(outcome) is kind, (one.plant, outcome)
                ends["error"] = ends.get("error", 0) + 1
                continue
            wanted = expected(*self._key(one))
            assert isinstance(outcome, Result), (one, outcome)
            cut = outcome.finish_reason in ("cancelled", "timeout")
            assert not cut or one.cancel_after is not None or "timeout" in one.options, one
            got = outcome.token_ids
            assert got == (wanted[: len(got)] if cut else wanted), one
            ends[outcome.finish_reason] = ends.get(outcome.finish_reason, 0) + 1
        self.engine.pool.check_integrity()
        metrics = self.engine.metrics()
        assert self.engine.pool.num_held_pages == 0, f"num_held_pages: {self.engine.pool.num_held_pages}"
        assert (metrics.num_requests_running, metrics.num_requests_waiting) == (0, 0)
        assert metrics.num_finished == ends
        assert not [thread for thread in threading.enumerate() if thread.name == "specdec-engine"]
        return {**ends, "preemptions": metrics.num_preemptions, "drafter faults": metrics.num_drafter_faults}

    def _key(self, one: Planned) -> tuple[Ask, str | None]:
        """The drafters that fail are held against plain decoding: what does not depend on drafts is promised."""
        ask = one.ask
        if ask.draft in ("unreliable", "dead"):
            ask = Ask(ask.prompt, "none", ask.seed, ask.new_tokens, ask.setting)
        return ask, one.options["kind"]


def _outcome(handle: Handle) -> Result | BaseException:
    try:
        return handle.result(1)
    except (RequestFaultError, TargetFaultError) as fault:
        return fault


class Weather:
    """Passes of the target that fail: for one prompt always, for everybody now and then."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.step, self.prefill = EnginePasses.step, EnginePasses.prefill
        self.num_lost = 0

    def patch(self, monkeypatch: Any) -> None:
        weather = self

        def step(passes: EnginePasses, lanes: Any, trees: Any, chunks: Any) -> Any:
            weather.look(chunks, 0.02)
            return weather.step(passes, lanes, trees, chunks)

        def prefill(passes: EnginePasses, chunks: Any) -> Any:
            weather.look(chunks, 0.0)
            return weather.prefill(passes, chunks)

        monkeypatch.setattr(EnginePasses, "step", step)
        monkeypatch.setattr(EnginePasses, "prefill", prefill)

    def look(self, chunks: list[Chunk], chance: float) -> None:
        if any(HEAVY in chunk.task.handle.prompt_ids for chunk in chunks):
            raise RuntimeError("this prompt is too heavy")
        if self.rng.random() < chance:
            self.num_lost += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
