"""A forked child of a process that has decoded decodes as well, or is told why not; it never waits for threads that
stayed behind. Each case runs in a process of its own, because a fork takes along whatever the tests before it did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

SETUP = """
import os, signal, sys, threading, time, warnings
import torch, transformers as tf, models, specdec
warnings.simplefilter("ignore")
torch.set_num_threads(2)
model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3)).eval()
ids = torch.randint(3, 499, (2, 200), generator=torch.Generator().manual_seed(0))
mask = torch.ones_like(ids)
def plain():
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist()
def ours(spec, **more):
    return spec.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **more).tolist()
def child(work, seconds=60):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(0)
    for _ in range(10 * seconds):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print("hangs", flush=True)
wanted = plain()
"""

CASES = {
    "after a call": """
spec = specdec.Speculator(model, "ngram", k=3)
assert ours(spec) == wanted
child(lambda: print(ours(spec) == wanted, torch.get_num_threads()))
""",
    "planned, and a new Speculator": """
spec = specdec.Speculator(model, "ngram")
ours(spec)
child(lambda: print(ours(spec) == wanted, ours(specdec.Speculator(model, model, k=2)) == wanted))
""",
    "during another thread's call": """
spec = specdec.Speculator(model, "ngram", k=3)
inside, go = threading.Event(), threading.Event()
def on_step(trace):
    inside.set()
    go.wait()
thread = threading.Thread(target=lambda: ours(spec, on_step=on_step))
thread.start()
inside.wait()
from specdec.planner.store import STORE
with STORE._lock:
    child(lambda: print(ours(spec) == wanted, STORE.explores({})))
go.set()
thread.join()
print(ours(spec) == wanted)
""",
    "in a callback": """
spec = specdec.Speculator(model, "ngram", k=3)
forked = []
def on_step(trace):
    if not forked:
        forked.append(1)
        child(lambda: ours(spec))
print(ours(spec, on_step=on_step) == wanted)
""",
    "an engine": """
with specdec.Engine(model, "ngram", k=3) as engine:
    handle = engine.submit(ids[0].tolist(), max_new_tokens=8, do_sample=False)
    handle.result()
    later = engine.submit(ids[1].tolist(), max_new_tokens=8, do_sample=False)
    child(lambda: engine.submit([5, 6], max_new_tokens=2))
    child(lambda: engine.step())
    child(lambda: print(engine.close()))
    print(later.result().token_ids == wanted[1][200:])
""",
}
SAID = {
    "after a call": ["True 1"],
    "planned, and a new Speculator": ["True True"],
    "during another thread's call": ["True True", "True"],
    "in a callback": ["UnsupportedArgumentError this Speculator is already decoding", "True"],
    "an engine": ["EngineClosedError expected an engine of this process", "EngineClosedError expected", "None", "True"],
}


def said(code: str) -> list[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": f"{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code], cwd=root, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("case", CASES)
def test_a_forked_child_decodes_or_is_told_why_not(case: str) -> None:
    found = said(CASES[case])
    assert len(found) == len(SAID[case]), found
    assert all(line.startswith(start) for line, start in zip(found, SAID[case], strict=True)), found


def test_without_that_a_child_hangs() -> None:
    """Control: what the library does about it is needed, and the tests above would see it missing."""
    found = said("""
import specdec.call_lock
specdec.call_lock.settle = lambda: None
spec = specdec.Speculator(model, "ngram", k=3)
with spec._lock:
    pass
child(lambda: print("decodes", plain() == wanted), seconds=3)
thread = threading.Thread(target=spec._lock.__enter__)
thread.start()
thread.join()
spec._lock.after_fork = lambda: None
torch.set_num_threads(1)
child(lambda: print("decodes", ours(spec) == wanted), seconds=3)
""")
    assert found[1:] == ["hangs"]
