"""What surrounds the steps: progress, checkpoints by the clock, and a clean stop on Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from specdec.experiments.train_pair.state import TrainingState


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Bar:
    """A tqdm bar that counts tokens and shows the latest losses."""

    def __init__(self, bar: tqdm, tokens_per_step: int):
        self.bar, self.tokens_per_step = bar, tokens_per_step

    def advance(self, values: dict[str, float]) -> None:
        """One step is done."""
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        self.bar.update(self.tokens_per_step)


class Session:
    """Saves every `save_seconds`; on SIGINT or SIGTERM finishes the step, saves, and raises `Interrupted`."""

    def __init__(self, save_seconds: float = 180.0, *, quiet: bool = False):
        self.save_seconds, self.quiet = save_seconds, quiet
        self.saved_at = time.monotonic()
        self.stop_asked = False

    @contextmanager
    def listening(self) -> Iterator[Session]:
        """Take over the two signals inside the block; a second one acts as usual."""

        def ask(signum: int, _frame: object) -> None:
            self.stop_asked = True
            signal.signal(signum, old[signal.Signals(signum)])

        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def progress(self, name: str, num_steps: int, done: int, tokens_per_step: int) -> Iterator[Bar]:
        """A progress bar with ETA; one line per half minute where there is no terminal, so that logs stay short."""
        interval = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(
            total=num_steps * tokens_per_step,
            initial=done * tokens_per_step,
            desc=name,
            unit="tok",
            unit_scale=True,
            mininterval=interval,
            maxinterval=interval,
            disable=self.quiet,
        ) as bar:
            yield Bar(bar, tokens_per_step)

    def after_step(self, state: TrainingState) -> None:
        """Save if it is time.

        Raises:
            Interrupted: if a signal asked for it, after saving.
        """
        if self.stop_asked or time.monotonic() - self.saved_at >= self.save_seconds:
            state.save()
            self.saved_at = time.monotonic()
        if self.stop_asked:
            raise Interrupted(f"stopped at {state.phase} step {state.step}; go on with --resume")
