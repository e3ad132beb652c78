"""What is trained and for how long: one frozen dataclass, three presets. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from specdec.shown_errors import ExperimentError


@dataclass(frozen=True)
class Shape:
    """The shape of one Llama (tied embeddings)."""

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


TARGET = Shape(num_layers=8, hidden=384, heads=6, kv_heads=2, head_dim=64, intermediate=1024)
# One layer: a draft step is dominated by fixed costs per layer, so width is nearly free and depth is not. Measured on
# two CPU cores, 1 x 256 costs what 1 x 192 costs (1/6 of a target step), 2 x 192 costs 1/4.5.
DRAFT = Shape(num_layers=1, hidden=256, heads=4, kv_heads=1, head_dim=64, intermediate=512)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the machine. Saved in every checkpoint.

    Phase 1 (`joint`) trains the target on text and, in the same step, the draft on the target's logits. Phase 2
    (`on_policy`) freezes the target and trains the draft on texts that the target wrote itself.
    """

    tokens: int
    seed: int = 0
    target: Shape = TARGET
    draft: Shape = DRAFT
    vocab_size: int = 4096
    max_positions: int = 2048
    tokens_per_step: int = 2048
    micro_batch_tokens: int = 1024  # bounds memory and stays in the CPU's cache
    short_length: int = 256
    long_length: int = 512
    long_fraction: float = 1 / 3  # the last part of the joint phase sees long windows
    warmup_steps: int = 60
    decay_fraction: float = 0.76  # the learning rate falls linearly to 0 over this last part of the joint phase
    hidden_lr: float = 5e-3
    other_lr: float = 3e-3
    weight_decay: float = 0.01
    distillation_ce: float = 0.1  # weight of the plain cross-entropy beside the soft one, in the joint phase
    on_policy_batches: int = 16
    on_policy_rows: int = 64
    on_policy_prompt: int = 64
    on_policy_length: int = 256  # prompt included
    on_policy_epochs: int = 5
    on_policy_lr: float = 0.5  # times the learning rates above
    on_policy_hard: float = 0.3  # weight of the cross-entropy to the target's own argmax
    on_policy_top: int = 64  # target probabilities kept per position; the rest is one pooled outcome
    optimizer: str = "muon"
    # A run that has less time than planned is brought to a good end by a steeper decay: until `cooldown_step` it
    # follows the schedule of `scheduled_tokens`, from there the rate falls linearly to 0 at `tokens`.
    scheduled_tokens: int | None = None
    cooldown_step: int | None = None

    def __post_init__(self) -> None:
        def check(right: bool, expected: str, *got: object) -> None:
            if not right:
                raise ExperimentError(f"expected {expected}, got {', '.join(map(str, got))}")

        short, long, micro, step = self.short_length, self.long_length, self.micro_batch_tokens, self.tokens_per_step
        both = self.scheduled_tokens, self.cooldown_step
        check(self.vocab_size <= 2**15, f"vocab_size <= {2**15} (ids are stored as int16)", self.vocab_size)
        check(self.optimizer in ("muon", "adamw"), "optimizer 'muon' or 'adamw'", repr(self.optimizer))
        check(
            long % short == step % long == 0,
            "short_length to divide long_length and long_length to divide tokens_per_step", short, long, step,
        )  # fmt: skip
        check(
            micro % long == step % micro == 0,
            "micro_batch_tokens to be a multiple of long_length that divides tokens_per_step", micro, long, step,
        )  # fmt: skip
        check(self.tokens >= step, f"tokens >= {step} (one step)", self.tokens)
        check((both[0] is None) == (both[1] is None), "scheduled_tokens and cooldown_step together or neither", *both)
        check(
            self.cooldown_step is None or 0 <= self.cooldown_step < self.num_steps <= self.scheduled_steps,
            f"0 <= cooldown_step < {self.num_steps} steps <= {self.scheduled_steps} scheduled steps",
            self.cooldown_step,
        )  # fmt: skip
        check(
            0 < self.on_policy_prompt < self.on_policy_length <= self.max_positions,
            f"0 < on_policy_prompt < on_policy_length <= {self.max_positions}",
            self.on_policy_prompt, self.on_policy_length,
        )  # fmt: skip

    @property
    def num_steps(self) -> int:
        """Steps of the joint phase."""
        return self.tokens // self.tokens_per_step

    @property
    def scheduled_steps(self) -> int:
        """Steps that the schedule is made for; more than `num_steps` in a run that was shortened."""
        return (self.scheduled_tokens or self.tokens) // self.tokens_per_step

    @property
    def first_long_step(self) -> int:
        return self.scheduled_steps - round(self.scheduled_steps * self.long_fraction)

    @property
    def first_decay_step(self) -> int:
        return self.scheduled_steps - round(self.scheduled_steps * self.decay_fraction)

    def length_at(self, step: int) -> int:
        """Window length of joint step `step`."""
        return self.long_length if step >= self.first_long_step else self.short_length

    def rate_at(self, step: int) -> float:
        """Learning-rate factor of joint step `step`: warm-up, flat, then linearly down to 0 at the planned end."""
        if self.cooldown_step is not None and step > self.cooldown_step:
            left = (self.num_steps - step) / (self.num_steps - self.cooldown_step)
            return self.rate_at(self.cooldown_step) * left
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = (self.scheduled_steps - step) / max(1, self.scheduled_steps - self.first_decay_step)
        return min(warmup, decay, 1.0)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        values = dict(values)
        return cls(**{**values, "target": Shape(**values["target"]), "draft": Shape(**values["draft"])})

    def same_until(self, other: Recipe, step: int) -> bool:
        """Whether the first `step` joint steps of both recipes are the same, so that one run can go on as the other.

        Only the plan (how long, how it ends) and the second phase may differ.
        """
        free = ("tokens", "scheduled_tokens", "cooldown_step")
        mine, others = (
            {k: v for k, v in asdict(recipe).items() if k not in free and not k.startswith("on_policy_")}
            for recipe in (self, other)
        )
        return mine == others and all(
            self.rate_at(i) == other.rate_at(i) and self.length_at(i) == other.length_at(i) for i in range(step)
        )


def preset(name: str) -> Recipe:
    """`tiny` runs in seconds (tests), `cpu` in about an hour and a half on two cores, `gpu` in minutes.

    Raises:
        ValueError: if there is no such preset.
    """
    if name == "tiny":
        small = Shape(num_layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=48)
        return Recipe(
            tokens=2048, target=small, draft=replace(small, num_layers=1), vocab_size=300, max_positions=256,
            tokens_per_step=128, micro_batch_tokens=64, short_length=16, long_length=32, warmup_steps=2,
            on_policy_batches=2, on_policy_rows=4, on_policy_prompt=8, on_policy_length=32, on_policy_epochs=2,
            on_policy_top=8,
        )  # fmt: skip
    if name == "cpu":
        return Recipe(tokens=1_300_000)
    if name == "gpu":
        return Recipe(
            tokens=16_000_000, tokens_per_step=8192, micro_batch_tokens=8192, on_policy_batches=96, on_policy_epochs=6
        )
    raise ExperimentError(f"expected preset 'tiny', 'cpu' or 'gpu', got {name!r}")
