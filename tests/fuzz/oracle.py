"""Plain `generate` says what is right: the same text, callbacks, scores and errors, and nothing changed afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import specdec
from fuzz.call import Call
from fuzz.log import Log, UsersError, apart, difference
from fuzz.outcome import Hang, Outcome, Script, TextGoesOn, outcome
from fuzz.refusals import documented
from fuzz.subjects import Subjects
from fuzz.unharmed import still_works, unharmed
from specdec.kv.versions import CACHE_KEYWORD

OURS_MAY_WARN = {"DrafterFaultWarning", "DraftContextWarning"}
CLEAR = (ValueError, TypeError, specdec.SpecdecError, UsersError, NotImplementedError)
"""What a user may be told with. Other errors must be the very ones that plain `generate` raises."""


@dataclass(frozen=True)
class Finding:
    """kind: what went wrong, the same for a call and a smaller one with the same fault; told: both sides."""

    kind: str
    call: Call
    told: str

    def __str__(self) -> str:
        return f"{self.kind}\n  {self.call}\n  {self.told}"


class Mismatch(Exception):
    """args: kind, details."""


def judge(call: Call, subjects: Subjects, thorough: bool = False) -> Finding | None:
    """Both sides of one call, compared. None: all is well.

    Args:
        thorough: also ask the object for a known text afterwards; done in any case after an error.
    """
    ours = outcome(lambda log: _ours(call, subjects, log))
    plain = Outcome(Log())
    try:
        if isinstance(ours.error, (Hang, AssertionError)):
            raise Mismatch("hang" if isinstance(ours.error, Hang) else "harm or internal error", "")
        plain = _plain(call, ours)
        _compare(call, plain, ours, subjects)
        if thorough or ours.error is not None:
            again = outcome(lambda log: still_works(call, subjects))
            if again.error is not None and not _cannot_be_built(call, subjects):
                raise Mismatch("broken afterwards", again.told())
    except Mismatch as found:
        subjects.forget()
        kind, details = found.args
        told = f"{details}\n  plain: {plain.told()}\n  ours:  {ours.told()}"
        return Finding(kind, call, told if ours.error is None else f"{told}\n{ours.where}")
    return None


def _cannot_be_built(call: Call, subjects: Subjects) -> bool:
    """Refused at construction: there is no object that could be broken."""
    try:
        subjects.engine(call) if call.form == "engine" else subjects.speculator(call)
    except Exception:
        return True
    return False


def _ours(call: Call, subjects: Subjects, log: Log) -> Any:
    positional, named = call.built(log)
    with unharmed(call, positional, named):
        return subjects.run(call, positional, dict(named))


def _plain(call: Call, ours: Outcome) -> Outcome:
    """Plain decoding: freely where the text is determined, along our text where it was drawn."""

    def run(log: Log) -> Any:
        positional, named = call.built(log)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return call.model.generate(*positional, **named)

    if not call.samples or ours.error is not None:
        found = outcome(run)
        if call.form == "engine" and found.error is None:
            found.value = found.sequences[0, call.lengths[0] :].tolist()
        return found
    width = max(call.lengths)
    engine = call.form == "engine"
    tokens = torch.tensor([ours.value]) if engine else ours.sequences[:, width:]
    script = Script(tokens)
    with script.drawn():
        found = outcome(run)
    if isinstance(found.error, TextGoesOn):
        raise Mismatch("text ends early", str(found.error))
    if found.error is None:
        _check_chances(tokens, script.chances, call.pad)
        if engine:
            found.value = found.sequences[0, call.lengths[0] :].tolist()
    return found


def _check_chances(tokens: Tensor, chances: Tensor, pad: int) -> None:
    """No token of probability zero (or NaN) before a row's end."""
    for row, (line, found) in enumerate(zip(tokens, chances, strict=True)):
        real = int((line != pad).nonzero().max()) + 1 if bool((line != pad).any()) else 0
        if not bool((found[:real] > 0).all()):
            raise Mismatch("impossible token", f"row {row}: {line.tolist()} has probabilities {found.tolist()}")


def _compare(call: Call, plain: Outcome, ours: Outcome, subjects: Subjects) -> None:
    if ours.error is not None:
        _compare_errors(call, plain, ours, subjects)
        return
    if plain.error is not None:
        raise Mismatch("accepts what plain refuses", "")
    subjects.answers["served"] += 1
    _compare_texts(call, plain, ours)
    for theirs, mine in ((plain.log.asked(), ours.log.asked()), (plain.log.streamed(), ours.log.streamed())):
        gap = difference(theirs, mine, None if call.form == "engine" else plain.sequences, call.pad)
        if gap is not None:
            raise Mismatch("callbacks saw something else", gap)
    if ours.notes - plain.notes - OURS_MAY_WARN:
        raise Mismatch("warnings", str(ours.notes - plain.notes))
    if call.samples and call.options.get("rule") == "coupled" and call.draft != "none" and call.form != "engine":
        undrafted: Any = specdec.Speculator(call.model, rule="coupled")
        positional, named = call.built(Log())
        alone = undrafted.generate(*positional, **named, **call.noise())
        alone = getattr(alone, "sequences", alone)
        if alone.tolist() != ours.sequences.tolist():
            raise Mismatch("coupled text depends on the draft", f"without one: {alone.tolist()}")


def _compare_errors(call: Call, plain: Outcome, ours: Outcome, subjects: Subjects) -> None:
    error = ours.error
    assert error is not None
    cause = error.__cause__
    if plain.error is None:
        if documented(call, error):
            subjects.answers["refused"] += 1
            return
        if call.samples and (isinstance(error, UsersError) or isinstance(cause, UsersError)):
            return  # what the user's code raised depends on what was drawn
        raise Mismatch(f"refuses what plain serves: {type(error).__name__}", "")
    subjects.answers["both refuse"] += 1
    wanted, told = plain.error, str(call.arguments)
    if not str(error).strip() and str(wanted).strip():
        raise Mismatch("error without a message", "")
    if isinstance(wanted, UsersError) and not (isinstance(error, UsersError) or isinstance(cause, UsersError)):
        if not documented(call, error):
            raise Mismatch("the user's own error is lost", "")
    if isinstance(wanted, UsersError) and isinstance(error, UsersError) and not call.samples and "fails=3" not in told:
        gap = difference(plain.log.asked(), ours.log.asked(), None, call.pad)
        if gap is not None:
            raise Mismatch("callbacks saw something else", gap)
    if not isinstance(error, CLEAR) and type(error) is not type(wanted):
        raise Mismatch(f"unclear error: {type(error).__name__}", "")


def _compare_texts(call: Call, plain: Outcome, ours: Outcome) -> None:
    if call.form == "engine":
        if plain.value != ours.value:
            raise Mismatch("other text", "")
        return
    if type(plain.value) is not type(ours.value):
        raise Mismatch("other class returned", f"plain {type(plain.value)}, ours {type(ours.value)}")
    theirs, mine = plain.sequences, ours.sequences
    if theirs.tolist() != mine.tolist():
        raise Mismatch("other text", "")
    if theirs.dtype != mine.dtype or theirs.device != mine.device:
        raise Mismatch("other dtype", f"plain {theirs.dtype}, ours {mine.dtype}")
    if isinstance(plain.value, Tensor):
        return
    for name in plain.value.keys() | ours.value.keys():
        wanted, found = plain.value.get(name), ours.value.get(name)
        if name in ("scores", "logits"):
            if name == "scores" or "InPlace" not in str(call.arguments):  # plain keeps what a processor writes into
                _compare_scores(name, theirs, wanted, found, call.pad)
        elif name != "sequences" and type(wanted) is not type(found):
            raise Mismatch("other fields returned", f"{name}: plain {type(wanted)}, ours {type(found)}")
        if name == CACHE_KEYWORD and wanted.get_seq_length() != found.get_seq_length():
            raise Mismatch("other cache", f"plain {wanted.get_seq_length()}, ours {found.get_seq_length()} columns")


def _compare_scores(name: str, sequences: Tensor, wanted: Any, found: Any, pad: int) -> None:
    """Behind a row's end ours are zero (documented); what plain computes there nobody can use."""
    if (wanted is None) != (found is None) or (wanted is not None and len(wanted) != len(found)):
        raise Mismatch(f"other number of {name}", "")
    for step, (theirs, mine) in enumerate(zip(wanted or (), found or (), strict=True)):
        column = sequences.shape[1] - len(wanted) + step
        over = (sequences[:, column:] == pad).all(1)
        gap = apart(theirs[~over], mine[~over])
        if gap is not None:
            raise Mismatch(f"other {name}", f"step {step}: {gap}")
        for row in over.nonzero()[:, 0].tolist():
            if bool((mine[row] != 0).any()) and apart(theirs[row], mine[row]) is not None:
                raise Mismatch(f"{name} behind the end of row {row} are not zero", "")
