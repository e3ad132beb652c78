"""`Engine`: many requests at once on one target, joining and leaving a running batch at every step."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor

from specdec.arguments import Draft, Target
from specdec.engine.arrivals import Arrivals
from specdec.engine.errors import refuse_forked
from specdec.engine.handle import Handle
from specdec.engine.intake import Intake
from specdec.engine.metrics import Counters, EngineMetrics
from specdec.engine.params import Params
from specdec.engine.recovery import recover, uninterrupted
from specdec.engine.scheduler import Limits
from specdec.engine.setup import make_pool, named_drafters
from specdec.engine.step_thread import StepThread
from specdec.engine.stepping import Stepping
from specdec.engine.task import Mark, Task, marks
from specdec.forks import renewed_after_fork
from specdec.kv import UnsupportedArgumentError
from specdec.kv.faults import from_outside
from specdec.kv.pool import DEFAULT_PAGE_SIZE, KVPool
from specdec.kv.quantised import quantised
from specdec.preparation import Preparation


class Engine:
    """Serves many requests with one target: continuous batching, paged K/V, speculation per request.

    A request's text is the one `Speculator.generate` gives for its prompt alone (same drafter with the same k or tree,
    same arguments, same `seed`), up to floating-point rounding: companions, page size, preemption and shared prefixes
    leave no trace in it.

    Args:
        target, draft, k, tree: as in Speculator, but a draft model without k and tree drafts chains of four: nothing is
            planned per request (see `adaptive`). `draft` is what requests use that name no drafter.
        drafters: further ones by name, for `submit(..., draft=name)`: causal LMs, `Drafter`s or "ngram".
        tokenizer: needed only for `stop_strings`.
        num_bytes: K/V of all models; num_pages: the same in pages of `page_size` slots.
        kv_dtype: "int8" or "fp8" keep K/V of all models in 8 bits a number. LOSSY, which `lossy=True` agrees to: texts
            follow the law of the target with such K/V, with drafts and without.
        max_rows: requests that run at once. max_step_tokens: tokens of the target per step, draft nodes and chunks of
            prefill included. max_waiting: requests that may wait (back-pressure).
        adaptive: draft no more than pays off for the whole batch, down to nothing (see `Params.seed` for the requests
            this leaves alone). False: every request drafts as deep as its drafter does.

    Without a thread of its own (`start`, or `with engine:`) whoever waits for a handle takes the engine's steps; Ctrl-C
    then ends the waiting, not the requests: the interrupted step is taken again with the next one, after K/V. While
    it has work, target and drafters are prepared as in `Speculator.generate`; do not use them from other threads.

    Example:
        with specdec.Engine(target, draft) as engine:
            handles = [engine.submit(ids, max_new_tokens=64, do_sample=True, seed=i) for i, ids in enumerate(prompts)]
            for token in handles[0]:
                print(token)
            texts = [handle.result().token_ids for handle in handles]

    Raises:
        UnsupportedModelError, UnsupportedArgumentError: as Speculator.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft = None,
        *,
        k: int | None = None,
        tree: Any = None,
        drafters: Mapping[str, Draft] | None = None,
        tokenizer: Any = None,
        num_bytes: int | None = None,
        num_pages: int | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        kv_dtype: str | None = None,
        lossy: bool = False,
        max_rows: int = 16,
        max_step_tokens: int = 512,
        max_waiting: int = 1024,
        adaptive: bool = True,
    ):
        kept = quantised(kv_dtype, lossy)
        limits = Limits.checked(max_rows, max_step_tokens, max_waiting)
        preparation = Preparation(target, tokenizer)
        self.target = target = preparation.target
        named = named_drafters(target, draft, k, tree, drafters or {})
        self.drafters, self.limits = tuple(named), limits
        pooled = make_pool(target, named, num_bytes, num_pages, page_size, kept)
        self._lock = threading.RLock()
        self._intake_lock = threading.RLock()
        self._arrivals = Arrivals()
        self._counters = Counters(kept)
        self._stepping = Stepping(target, named, pooled, self.limits, self._counters, adaptive)
        self._intake = Intake(preparation, named, self._stepping.vocab, self._stepping.device)
        self._tasks: dict[int, Task] = {}
        self._prepared, self._is_prepared = ExitStack(), False
        self._stepper: int | None = None
        self._thread = StepThread(self.step, lambda: self._idle, self._arrivals.work)
        self._process = os.getpid()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """See `renewed_after_fork`."""
        self._lock, self._intake_lock = threading.RLock(), threading.RLock()
        self._arrivals = Arrivals()
        self._stepper = None

    @property
    def pool(self) -> KVPool:
        """Where the K/V of all requests lives."""
        return self._stepping.pool

    @property
    def max_request_tokens(self) -> int:
        """What prompt and new tokens of one request may be together, by whatever drafter."""
        return self._stepping.max_request_tokens

    @property
    def threaded(self) -> bool:
        """Whether a thread of the engine's own takes the steps, so that whoever asks may wait for them."""
        return self._thread.alive and not self._thread.current

    def submit(self, prompt: Sequence[int] | Tensor, params: Params | None = None, **options: Any) -> Handle:
        """Queue one request; safe from any thread, and waits for no step to end.

        Args:
            prompt: token ids, a list or a tensor `[tokens]` or `[1, tokens]`.
            params: see `Params`; `options` are its fields or arguments of `generate`, and go before it.

        Raises:
            UnsupportedArgumentError, ValueError: what cannot be decoded, or can never fit the pool.
            QueueFullError: `max_waiting` requests wait already. EngineClosedError: after `close`.
        """
        asked = (params or Params()).changed(options)
        scheduler, most = self._stepping.scheduler, self.limits.max_waiting
        refuse_forked(self._process)
        with self._intake_lock:
            self._arrivals.refuse(len(scheduler.waiting), most)
            task = self._intake.task(self, prompt, asked, self._stepping.num_steps)
            scheduler.refuse(task)
            self._arrivals.add(task, len(scheduler.waiting), most)
        return task.handle

    def step(self) -> bool:
        """One step for everybody who can run; returns whether anything is left to do."""
        if self._process != os.getpid():
            refuse_forked(self._process)
        with self._lock:
            self._refuse_within_step()
            self._stepping.take(self._arrivals.take_into(self._tasks))
            if not self._stepping.scheduler.idle:
                before = marks(self._tasks.values())
                self._stepper = threading.get_ident()
                try:
                    self._take_step()
                except BaseException as fault:
                    # Ctrl-C of somebody who waits for one request is not the others' end.
                    outside = from_outside(fault) or not isinstance(fault, Exception)
                    if outside and not self._thread.current:
                        self._recover(before)
                    else:
                        self._abandon(fault)
                    raise
                finally:
                    self._stepper = None
            if self._idle:
                self._rest()
                return False
            return True

    @property
    def _idle(self) -> bool:
        return self._stepping.scheduler.idle and not len(self._arrivals)

    def _take_step(self) -> None:
        if self._stepping.models_changed():
            self._rest()  # passes were prepared for what the models were
            self._stepping.renew()
        self._prepare()
        with torch.no_grad():  # models with hooks run outside of inference mode
            for task in self._stepping.step():
                del self._tasks[task.handle.id]

    def run(self) -> None:
        """Take steps until every request is done."""
        while self.step():
            pass

    def cancel(self, handle: Handle) -> None:
        """End a request with the tokens it has, at the next step."""
        task = self._arrivals.find(handle.id) or self._tasks.get(handle.id)
        if task is not None and task.handle is handle:
            task.cancelled = True

    def clear_prefix_cache(self) -> None:
        """Forget the K/V of all prompts and texts seen so far, and what was read of the target's weights.

        To be called after changes of the models' weights that the engine cannot see (see docs/serving.md). Requests in
        flight go on with K/V that is computed anew from their text.
        """
        refuse_forked(self._process)
        with self._lock:
            self._refuse_within_step()
            self._rest()
            self._stepping.read_anew()

    def metrics(self) -> EngineMetrics:
        """A snapshot of counts and latencies."""
        with self._lock:
            scheduler, pool = self._stepping.scheduler, self.pool
            usage = pool.num_held_pages / scheduler.num_pages
            running, waiting = len(scheduler.running) + len(scheduler.prefilling), len(scheduler.waiting)
            return self._counters.snapshot(running, waiting + len(self._arrivals), usage)

    def start(self) -> None:
        """Take steps in a thread of the engine's own from now on."""
        refuse_forked(self._process)
        self._arrivals.refuse_closed()
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread after the step at hand; requests keep their places."""
        self._thread.stop()

    def close(self) -> None:
        """Cancel what is left, end the thread, let go of the models. Repeating it is no error, nor is it in a forked
        child, where there is nothing to end."""
        if self._process != os.getpid():
            return
        self._refuse_within_step()
        self.stop()
        with self._lock:
            self._arrivals.close()
            self._stepping.take(self._arrivals.take_into(self._tasks))
            for task in list(self._tasks.values()):
                task.cancelled = True
            with suppress(Exception):  # whom it concerns has been told
                self.run()
            self._stepping.close()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def _refuse_within_step(self) -> None:
        if self._stepper == threading.get_ident():
            raise UnsupportedArgumentError(
                "the engine is in the middle of a step, and this call comes from a request's own code (a processor or "
                "a criterion): it can neither take a step nor wait for one, clear or close the engine"
            )

    def _prepare(self) -> None:
        if not self._is_prepared:
            with ExitStack() as entered:
                for context in self._stepping.contexts():
                    entered.enter_context(context)
                self._prepared = entered.pop_all()  # all of them, or none
            self._is_prepared = True

    def _rest(self) -> None:
        if self._is_prepared:
            try:
                self._prepared.close()  # first: closing what was interrupted again is no error, forgetting it would be
            except Exception:
                self._is_prepared = False  # all of it was left, as far as it can be
                raise
            self._is_prepared = False

    def _recover(self, before: Mapping[Task, Mark]) -> None:
        with uninterrupted():
            recover(self._stepping, list(self._tasks.values()), before)
            self._tasks = {number: task for number, task in self._tasks.items() if not task.handle.done}
            self._rest()

    def _abandon(self, fault: BaseException) -> None:
        """A step failed in a way no request is to blame for: all of them are told, the engine is as if it were new."""
        with uninterrupted():
            tasks = [task for task in self._tasks.values() if not task.handle.done]
            self._tasks.clear()
            self._stepping.abandon(tasks, fault)
            with suppress(Exception):
                self._rest()
