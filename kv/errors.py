"""Every error the library raises on purpose. They live on the lowest floor so that each floor can raise them."""


class SpecdecError(Exception):
    """Base of all errors raised by specdec; its text says what was expected, what came and what to do."""


class UnsupportedModelError(SpecdecError, ValueError):
    """The model cannot be decoded speculatively (recurrent state, encoder-decoder, no positions...)."""


class UnsupportedArgumentError(SpecdecError, ValueError):
    """An argument of `generate` or of a constructor that cannot be honoured."""


class InvalidTreeError(SpecdecError, ValueError):
    """A draft tree that breaks its contract (ids out of range, parents out of order, wrong q rows...)."""


class CacheStateError(SpecdecError, RuntimeError):
    """The KV cache was used out of order (commit without a tail, rows out of range...)."""


class TargetFaultError(SpecdecError, RuntimeError):
    """The target failed (NaN logits, exception, out of memory) at a known step; the cache is consistent again.

    Attributes:
        step: index of the decode step that failed (0 = first after the prefill).
        emitted: per row, the token ids emitted before the fault; nothing already generated is lost.
    """

    def __init__(self, message: str, step: int, emitted: list[list[int]]):
        super().__init__(message)
        self.step = step
        self.emitted = emitted


class LeadingRankError(SpecdecError, RuntimeError):
    """Of a target that several processes hold, the one that decides for all failed; its own error says how."""


class OutOfPagesError(SpecdecError, RuntimeError):
    """A KV pool has too few free pages for what was asked. Nothing was changed: free some (close a sequence) and retry.

    Attributes:
        needed: pages the operation needs.
        free: pages that were free, unreferenced prefixes included.
    """

    def __init__(self, needed: int, free: int, num_pages: int):
        super().__init__(
            f"expected {needed} free pages, the pool has {free} of {num_pages}: close or preempt a sequence and try "
            "again, or give the pool more bytes"
        )
        self.needed = needed
        self.free = free
