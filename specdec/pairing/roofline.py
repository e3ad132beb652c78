"""What a pair can gain on a device, from bytes and operations alone: an estimate, not a measurement.

A decode pass over n tokens per row reads every weight and the K/V of the context once and multiplies each weight by
each token. With B rows, context c, w bytes per weight and b per K/V number it takes

    t(n) = max(sqrt(memory^2 + compute^2), launch)
    memory = (w * step_parameters + b * B * c * kv_values) / (share of the bandwidth)
    compute = 2 * step_parameters * B * n / (share of the peak operations)
    launch = layers * time to launch one layer's kernels

The root of the sum of squares stands for transfers and products that overlap, but not perfectly. A step drafts `depth`
passes of t_draft(1) each, verifies n = nodes + 1 tokens, and emits tau of them (mean acceptance length), so

    speed-up = tau * t_target(1) / (t_target(nodes + 1) + depth * t_draft(1))

For a chain of k whose tokens are each accepted with probability a, tau = (1 - a^(k+1)) / (1 - a) (Leviathan et al.,
2211.17192, equation 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from specdec.pairing.devices import LAUNCHES, device_of
from specdec.pairing.errors import PairError
from specdec.pairing.schema import MOST, Facts, Pair, Published

BANDWIDTH_SHARE = 0.9
"""Of the data sheet's bandwidth that good kernels reach."""
COMPUTE_SHARE = 0.7
"""Of the data sheet's operations that large matrix products reach."""
LAUNCH_MS = {"graphs": 0.01, "eager": 0.26}
"""Per layer: Llama-3.1-8B (32 layers) decodes a token in 8.4 ms from Python on an H100 whatever the bandwidth says."""
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MAX_CHAIN = 24
_BYTES = {"float32": 4.0, "float64": 8.0, "bfloat16": 2.0, "float16": 2.0, "auto": 2.0}


@dataclass(frozen=True)
class Setting:
    """Where and how an estimate runs.

    device: see devices.device_of. context: tokens in the K/V cache. batch: rows. weight_bits: of both models' weights;
    None: the pair's dtype. K/V stays 16 bit wide. num_devices: their memory adds up; with `parallel` (tensor
    parallelism) so do their bandwidth and operations, communication left out; without, layers run one after the other.
    """

    device: str = "h200"
    context: int = 1024
    batch: int = 1
    weight_bits: float | None = None
    launch: str = "graphs"
    num_devices: int = 1
    parallel: bool = True

    def __post_init__(self) -> None:
        device_of(self.device)
        if self.launch not in LAUNCHES:
            raise PairError(f"launch: expected one of {', '.join(LAUNCHES)}, got {self.launch!r}")
        given = (self.batch, self.num_devices, self.context)
        if min(given[:2]) < 1 or self.context < 0 or max(given) > MOST:
            raise PairError(
                f"expected batch >= 1, num_devices >= 1 and context >= 0, none above {MOST:.0e}, got "
                f"{self.batch}, {self.num_devices} and {self.context}"
            )
        if self.weight_bits is not None and not 1 <= self.weight_bits <= 64:
            raise PairError(f"weight_bits: expected 1 to 64, got {self.weight_bits}")


class Gain(NamedTuple):
    """Chains whose tokens are accepted with probability alpha: the best length, and what it gives."""

    alpha: float
    k: int
    tokens_per_pass: float
    speedup: float


@dataclass(frozen=True)
class Estimate:
    """All times in ms, memory in GB (1e9 bytes).

    plain_ms: one token without speculation, the floor per step. draft_ms: one draft pass. verify_ms: by number of
    tokens in the pass. cost: draft_ms / plain_ms. gains: per acceptance probability. break_even: the acceptance
    probability above which one drafted token pays.
    """

    title: str
    target_gb: float
    draft_gb: float
    kv_gb: float
    memory_gb: float
    plain_ms: float
    draft_ms: float
    verify_ms: dict[int, float]
    cost: float
    break_even: float
    gains: tuple[Gain, ...]

    @property
    def total_gb(self) -> float:
        return self.target_gb + self.draft_gb + self.kv_gb

    @property
    def fits(self) -> bool:
        return self.total_gb <= self.memory_gb


def estimate(pair: Pair, setting: Setting) -> Estimate:
    """Memory, floor per step and speed-up by acceptance.

    Raises:
        PairError: the pair does not state the facts that are needed.
    """
    target, draft = pair_facts(pair)
    width = _weight_bytes(pair, setting)
    device = device_of(setting.device)
    plain = pass_ms(target, 1, setting, width)
    drafting = 0.0 if draft is None else pass_ms(draft, 1, setting, width)
    kv_values = target.kv_values_per_token + (0 if draft is None else draft.kv_values_per_token)
    gains = tuple(_best_chain(alpha, target, drafting, setting, width) for alpha in ALPHAS)
    one = pass_ms(target, 2, setting, width) + drafting
    return Estimate(
        title=f"{setting.num_devices} x {device.title}" if setting.num_devices > 1 else device.title,
        target_gb=target.num_parameters * width / 1e9,
        draft_gb=0.0 if draft is None else draft.num_parameters * width / 1e9,
        kv_gb=2 * kv_values * setting.context * setting.batch / 1e9,
        memory_gb=device.memory * setting.num_devices,
        plain_ms=plain,
        draft_ms=drafting,
        verify_ms={n: pass_ms(target, n, setting, width) for n in (2, 4, 8, 16, 32, 64)},
        cost=drafting / plain,
        break_even=one / plain - 1,
        gains=gains,
    )


def published_estimate(pair: Pair, entry: Published, context: int = 512) -> float | None:
    """The speed-up this model expects for a published configuration; None where no acceptance was published."""
    if entry.tokens_per_pass is None:
        return None
    return entry.tokens_per_pass / _steps_worth(pair, entry, context)


def implied_tokens_per_pass(pair: Pair, entry: Published, context: int = 512) -> float:
    """Tokens per pass that the published speed-up would need if this model of the costs were exact."""
    return entry.speedup * _steps_worth(pair, entry, context)


def pair_facts(pair: Pair) -> tuple[Facts, Facts | None]:
    """Target's and drafter's facts; None for a drafter without a model.

    Raises:
        PairError: not stated.
    """
    if pair.target.facts is None:
        raise PairError(f"pair {pair.name!r}: an estimate needs [target.facts] (`specdec pairs new` reads them)")
    if pair.draft.kind in ("self", "suffix"):
        drafter = "a target that drafts for itself" if pair.draft.kind == "self" else "suffixes"
        raise PairError(f"pair {pair.name!r}: nothing is estimated for {drafter}; run `specdec bench`")
    if pair.draft.kind != "ngram" and pair.draft.facts is None:
        raise PairError(f"pair {pair.name!r}: an estimate needs [draft.facts] (`specdec pairs new` reads them)")
    return pair.target.facts, pair.draft.facts


def pass_ms(facts: Facts, tokens: int, setting: Setting, weight_bytes: float) -> float:
    """One forward pass over `tokens` per row, in ms."""
    device = device_of(setting.device)
    ways = setting.num_devices if setting.parallel else 1
    kv_bytes = 2 * facts.kv_values_per_token * setting.context * setting.batch
    memory = (weight_bytes * facts.step_parameters + kv_bytes) / (device.bandwidth * ways * BANDWIDTH_SHARE * 1e6)
    operations = 2 * facts.step_parameters * setting.batch * tokens
    compute = operations / (device.tflops * ways * COMPUTE_SHARE * 1e9)
    return max(math.hypot(memory, compute), facts.num_layers * LAUNCH_MS[setting.launch])


def chain_tokens(alpha: float, k: int) -> float:
    """Expected tokens per pass of a chain of k, each accepted with probability alpha."""
    return k + 1.0 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)


def step_cost(pair: Pair, setting: Setting, nodes: int, depth: int) -> float:
    """How many plain tokens' time a step takes that verifies `nodes` drafted tokens, made in `depth` draft passes.

    Raises:
        PairError: as estimate.
    """
    target, draft = pair_facts(pair)
    return _step_cost(target, draft, setting, _weight_bytes(pair, setting), nodes, depth)


def _step_cost(target: Facts, draft: Facts | None, setting: Setting, width: float, nodes: int, depth: int) -> float:
    drafting = 0.0 if draft is None else depth * pass_ms(draft, 1, setting, width)
    return (pass_ms(target, nodes + 1, setting, width) + drafting) / pass_ms(target, 1, setting, width)


def _best_chain(alpha: float, target: Facts, drafting: float, setting: Setting, width: float) -> Gain:
    plain = pass_ms(target, 1, setting, width)
    gains = [Gain(alpha, 0, 1.0, 1.0)]
    for k in range(1, MAX_CHAIN + 1):
        tokens = chain_tokens(alpha, k)
        gains.append(Gain(alpha, k, tokens, tokens * plain / (pass_ms(target, k + 1, setting, width) + k * drafting)))
    return max(gains, key=lambda gain: gain.speedup)


def _steps_worth(pair: Pair, entry: Published, context: int) -> float:
    """How many plain tokens' time one speculative step takes in a published configuration."""
    target, draft = pair_facts(pair)
    setting = Setting(
        device=entry.device, context=context, launch=entry.launch, num_devices=entry.num_devices,
        parallel=entry.parallel,
    )  # fmt: skip
    return _step_cost(target, draft, setting, entry.weight_bits / 8, entry.nodes, entry.depth)


def _weight_bytes(pair: Pair, setting: Setting) -> float:
    return _BYTES[pair.dtype] if setting.weight_bits is None else setting.weight_bits / 8
