"""What surrounds the steps: progress, checkpoints by the clock, and a clean stop on Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from specdec.experiments.train_pair.state import TrainingState


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


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
    def progress(self, name: str, total: int, done: int, tokens: int) -> Iterator[Callable[[dict[str, float]], None]]:
        """A bar that counts the tokens of steps, with what is left; what it yields shows the losses of one more.

        One line per half minute where there is no terminal, so that logs stay short.
        """
        interval = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(
            total=total * tokens, initial=done * tokens, desc=name, unit="tok", unit_scale=True, mininterval=interval,
            maxinterval=interval, disable=self.quiet,
        ) as bar:  # fmt: skip

            def advance(values: dict[str, float]) -> None:
                bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
                bar.update(tokens)

            yield advance

    def steps(self, name: str, state: TrainingState, total: int, step: Callable[[], dict[str, float]]) -> None:
        """Take the steps of a phase that are left; each returns its losses, which are logged and shown."""
        with self.progress(name, total, state.step, state.recipe.tokens_per_step) as advance:
            while state.step < total:
                values = step()
                state.step += 1
                if state.step % 10 == 0 or state.step == total:
                    state.log(**values)
                advance(values)
                self.after_step(state)

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
