"""K/V audit: after random accept/reject histories the cache and the logits are those of plain passes over the text."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from specdec.drafters.base import CACHE_NAME
from specdec.kv.versions import cached
from specdec.lab.findings import Finding, Status
from specdec.lab.rounding import nudged_logits
from specdec.monitor import Monitor, Watched
from specdec.speculator import Speculator
from specdec.target import TARGET
from specdec.trace import StepTrace

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest relative error of one token's keys or values in one layer. Those of another token, or of this token at
another position, are wrong by about 1."""
LOGIT_MARGIN, TOKEN_MARGIN = 3.0, 16.0
"""So many times what rounding moves logits by may those of verification passes differ from a plain pass's: all of them
together (honest passes were found within 1.4), and those of any one token. Root mean squares over the vocabulary."""
ROUNDINGS = 2
"""Passes from which it is learned what rounding does: every logit counts, so that few are enough."""
_PEAK = 4.0
"""The largest of many differences, in their root mean square."""


class Snapshot(NamedTuple):
    """One row of one model's committed K/V at some step: `layers` of `[kv_heads, tokens, head_dim]` pairs."""

    name: str
    model: Any
    text: Tensor
    layers: list[tuple[Tensor, Tensor]]


class KVAudit(Monitor):
    """Takes snapshots while the loop runs and compares them once the models are their plain selves again.

    Args:
        most: snapshots to take per call and model, at random steps and rows.
    """

    def __init__(self, seed: int, most: int = 8):
        self._rng = random.Random(seed)
        self._most = most
        self._taken: list[list[Snapshot]] = []
        self._seen = 0
        self.compared = 0
        self.worst: dict[str, float] = {}
        self.worst_ratio = 0.0

    def stepped(self, loop: Watched) -> None:
        if not loop.rows.live:
            return
        self._seen += 1
        slot = len(self._taken) if len(self._taken) < self._most else self._rng.randrange(self._seen)
        if slot >= self._most:
            return
        i = self._rng.randrange(len(loop.rows.live))
        found = [self._snapshot(loop, TARGET, loop.target, i)]
        drafter = loop.drafter
        model = getattr(getattr(drafter, "inner", None), "model", None)
        if drafter is not None and drafter.keeps_kv and model is not None:
            found.append(self._snapshot(loop, CACHE_NAME, model, i))
        self._taken[slot : slot + 1] = [found]

    def _snapshot(self, loop: Watched, name: str, model: Any, i: int) -> Snapshot:
        held = min(loop.cache.filled(name)[i], loop.cache.lengths[i])
        text = loop.rows.text[loop.rows.live[i], :held].clone()
        return Snapshot(name, model, text, [(k.clone(), v.clone()) for k, v in loop.cache.layers(name, i)])

    @torch.no_grad()
    def compare(self) -> None:
        """Check all snapshots taken so far against fresh prefills, and forget them."""
        for name, model, text, layers in (snapshot for taken in self._taken for snapshot in taken):
            if not len(text):
                continue
            cache: Any = DynamicCache()  # without a config no layer drops tokens, windowed ones included
            model(input_ids=text[None], **cached(model, cache))
            for (keys, values), plain in zip(layers, cache.layers, strict=True):
                for got, wanted in ((keys, plain.keys[0]), (values, plain.values[0])):
                    error = float(_relative(got, wanted).max())
                    self.worst[name] = max(self.worst.get(name, 0.0), error)
                    self.worst_ratio = max(self.worst_ratio, error / TOLERANCE.get(got.dtype, 0.25))
                    self.compared += got.shape[1]
        self._taken, self._seen = [], 0

    def finding(self) -> Finding:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.worst.items())
        detail = f"{self.compared} token layers against fresh prefills, largest relative errors: {errors}"
        if not self.compared:
            return Finding("K/V cache", "skipped", "no snapshot was taken")
        status: Status = "pass" if self.worst_ratio <= 1 else "FAIL"
        return Finding("K/V cache", status, detail, {"compared": self.compared, "relative_errors": self.worst})


def _relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Per token, the norm of the difference over the norm of what is wanted; NaN counts as wrong."""
    if got.shape != wanted.shape:
        return torch.tensor([torch.inf])
    difference = (got.double() - wanted.double()).transpose(0, 1).flatten(1).norm(dim=1)
    size = wanted.double().transpose(0, 1).flatten(1).norm(dim=1)
    return torch.nan_to_num(difference / size.clamp(min=1e-30), nan=torch.inf)


class LogitAudit:
    """The target's logits along emitted texts against one plain pass over each text."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.compared = 0
        self._apart = self._noise = 0.0
        self._floor = 0.0

    @torch.no_grad()
    def add(self, spec: Speculator, prompt: Tensor, rows: int, new_tokens: int, noise: float, **arguments: Any) -> None:
        """Generate `rows` continuations of `prompt` and compare every emitted token's logits.

        Args:
            noise: largest difference of logits between plain passes of other shapes.
        """
        emitted = [0] * rows

        def count(trace: StepTrace) -> None:
            for row, run in zip(trace.rows, trace.emitted, strict=True):
                emitted[row] += len(run)

        out: Any = spec.generate(
            prompt.expand(rows, -1), attention_mask=torch.ones_like(prompt).expand(rows, -1), max_new_tokens=new_tokens,
            return_dict_in_generate=True, output_logits=True, on_step=count, **arguments,
        )  # fmt: skip
        ours = torch.stack(out.logits, dim=1)
        target: Any = spec.target
        text, vocab = out.sequences[:, :-1], ours.shape[-1]
        plain = target(input_ids=text).logits[:, prompt.shape[1] - 1 :, :vocab].to(ours.dtype)
        places = torch.arange(ours.shape[1], device=ours.device)
        real = places < torch.tensor(emitted, device=ours.device)[:, None]
        apart = torch.nan_to_num(_squares(ours, plain), nan=torch.inf)[real]
        moved = nudged_logits(target, text, ours.shape[1], ROUNDINGS)[..., :vocab].to(ours.dtype)
        self.worst = max(self.worst, float(apart.max().sqrt()))
        self._apart += float(apart.sum())
        self._noise += float(torch.stack([_squares(one, plain)[real] for one in moved]).mean(0).sum())
        # Recorded logits are float32 whatever the model computes in.
        rounding = 2 * torch.finfo(torch.float32).eps * float(plain.abs().max())
        self._floor = max(self._floor, noise / _PEAK, rounding)
        self.compared += int(real.sum())

    def finding(self) -> Finding:
        count = max(1, self.compared)
        noise = max(self._floor, math.sqrt(self._noise / count))
        apart = math.sqrt(self._apart / count)
        detail = (
            f"{self.compared} tokens against plain passes, {apart:.1e} apart (limit {LOGIT_MARGIN * noise:.1e}), one "
            f"token at most {self.worst:.1e} (limit {TOKEN_MARGIN * noise:.1e}); rounding moves logits by {noise:.1e}"
        )
        figures = {"compared": self.compared, "difference": apart, "largest_difference": self.worst, "noise": noise}
        wrong = apart > LOGIT_MARGIN * noise or self.worst > TOKEN_MARGIN * noise
        return Finding("verification logits", "FAIL" if wrong else "pass", detail, figures)


def _squares(logits: Tensor, plain: Tensor) -> Tensor:
    """Mean squares of what logits differ by, `[rows, tokens]`; those that are equal, infinities too, by nothing."""
    difference = torch.where(logits == plain, 0.0, logits.double() - plain.double())
    return difference.square().mean(-1)
