"""When to decode plainly without asking, and when to try drafting again: every wait is twice as long as the last."""

from __future__ import annotations

FIRST_WAIT, LAST_WAIT = 16, 128
"""Plain steps before the first probe after a stop; doubled at every further stop in a row up to the last."""
PATIENCE = 8
"""Steps a probe waits for an option that may be empty to find anything."""


class ProbeBackoff:
    """Says when a drafter that was given up is tried again (a probe), for one call: waits double from stop to stop.

    Attributes:
        probing: the step to come (or just taken) tries a drafter that was given up.
        waited: plain steps before that, since drafting was given up.
    """

    def __init__(self) -> None:
        self.probing = False
        self.waited = 0
        self._stopped = False
        self._wait = 0
        self._next = FIRST_WAIT
        self._patience = PATIENCE
        self._run = 0

    def waits(self) -> bool:
        """Is the coming step a plain one in any case? Counts it if so."""
        self.probing = False
        if self._wait > 0:
            self._wait -= 1
            return True
        self.probing = self._stopped
        return False

    def too_late(self, left: int | None) -> bool:
        """Is this a probe for which too little of the text is left?

        What a probe finds serves the tokens that are left. Where these are fewer than the steps that were waited, the
        probe is dropped, and no further one is made.

        Args:
            left: tokens that the longest row may still get; None without a limit.
        """
        if left is None or not self.probing or left >= self.waited:
            return False
        self._wait = left
        return True

    @property
    def begins(self) -> bool:
        """Is this the first step of a probe?"""
        return self.probing and self._patience == PATIENCE

    def stop(self) -> bool:
        """Nothing pays (or nothing is affordable, where a probe was due): the coming step and some more are plain.

        Returns:
            True when drafting was given up, False when a probe was put off.
        """
        given_up = not self.probing
        wait = self._next if given_up else FIRST_WAIT
        self.waited = wait if given_up else self.waited + wait
        self._wait = wait - 1
        self._next = min(2 * self._next, LAST_WAIT) if given_up else self._next
        self._stopped, self._patience, self._run = True, PATIENCE, 0
        self.probing = False
        return given_up

    def go(self) -> None:
        """The coming step drafts."""
        self._stopped = False
        self._run += 1
        if self._run >= FIRST_WAIT:  # it lasts: the next stop is a first one again
            self._next = FIRST_WAIT

    def found_nothing(self) -> None:
        """A probe's option had nothing to propose: it goes on, for a while."""
        self._patience -= 1
        if self._patience > 0:
            self._stopped = True
