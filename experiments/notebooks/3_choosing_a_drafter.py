# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Choosing a drafter for a model
#
# Three numbers decide: whether the drafter speaks the target's **vocabulary**, what a pass of it **costs** relative
# to one of the target, and how often its tokens are **accepted** on *your* prompts. Then let the planner do the rest.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import specdec
from specdec.experiments.accept.metrics import Runs
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.report.panels import panels
from specdec.experiments.accept.runner import run
from specdec.experiments.accept.scores import Logs
from specdec.experiments.accept.store import Store
from specdec.pairing import find_pair, pair_names
from specdec.pairing.loading import load_tokenizer, shared_ids
from specdec.pairing.roofline import Setting, chain_tokens, estimate
from specdec.shipped import pair_folder

# %% [markdown]
# ## Before you download anything
#
# More than fifty pairs are known by name. An estimate from bytes and operations says what a pair could gain on a
# device; it measures nothing, and what it cannot know is the acceptance rate, so it tells the gain for each.

# %%
print([name for name in pair_names() if name.startswith("qwen3")])
for name in ("qwen3-8b-0.6b", "qwen3-32b-1.7b"):
    result = estimate(find_pair(name), Setting(device="h200"))
    print(
        f"{name}: a draft pass costs {result.cost:.2f} of a target pass; drafting pays above "
        f"{result.break_even:.2f} acceptance"
    )
    for gain in result.gains[2:]:
        print(f"   {gain.alpha:.2f} accepted: best k = {gain.k}, {gain.speedup:.2f}x")

# %% [markdown]
# ## 1. One vocabulary
#
# Token ids must mean the same to both models. `from_pair` and `specdec pairs validate` check it; by hand it is one
# number:

# %%
folder = pair_folder("stdlib-python")
vocabularies = [load_tokenizer(str(folder / part)).get_vocab() for part in ("target", "draft")]
print(f"shared token ids: {shared_ids(*vocabularies):.0%}")
assert shared_ids(*vocabularies) == 1.0

# %% [markdown]
# ## 2. and 3. Cost and acceptance, on your prompts
#
# One run measures both for several candidates, close together in time, against plain decoding of the same prompts.
# These are the prompts that ship with the library (code, edits, prose, lists); for your own give
# `prompts=("jsonl:FILE",)`.

# %%
workplace = tempfile.TemporaryDirectory()
results = Path(workplace.name)
options = AcceptOptions(
    out=results,
    settings=("model:k=1", "model:k=3", "model:k=6", "ngram:k=6"),
    max_rules=1,
    temperatures=(0.0,),
    prompts=("shipped",),
    num_prompts=4,
    new_tokens=32,
    log=False,
    report=False,
    threads=torch.get_num_threads(),
)
assert run(options) == 0

# %% [markdown]
# Up and left is better in the second picture: more tokens per step, less time per step. The lines of the first are a
# forecast for every `k`, from the measured costs and acceptance: it rises while one more token is likely enough to be
# kept, then flattens and falls. (On a busy machine the times, and with them the speed-ups, are noisy; tokens per step
# are not.)

# %%
store = Store(results)
runs = Runs.read(store)
drawn = {panel.title: panel for panel in panels(runs, Logs(store))}
for title in ("Speed-up by k", "What a step costs and gives", "By domain"):
    print(f"{title}. {drawn[title].note}")
    drawn[title].draw(plt.figure(figsize=(9, drawn[title].height), layout="constrained"))
    plt.show()

# %% [markdown]
# Behind such a line is a formula. If a drafted token is kept with probability `a`, a chain of `k` emits
# `tau = (1 - a^(k+1)) / (1 - a)` tokens per step on average. If a draft pass costs `c` and checking the chain costs
# `v`, both in passes of the target over one token, the gain is `tau / (v + c k)`. On a GPU that waits for its memory
# `v` is nearly 1; on a CPU it grows with `k`.

# %%
cells = {str(cell.setting): runs.stats(cell) for cell in runs.cells()}
plain = cells["none"]
for k in (1, 3, 6):
    chain = cells[f"model:k={k}"]
    alpha, c, v = chain.alpha, chain.ms[0] / k / plain.ms[1], chain.ms[1] / plain.ms[1]
    tau = chain_tokens(alpha, k)
    print(
        f"k = {k}: alpha = {alpha:.2f}, c = {c:.2f}, v = {v:.2f}: {tau:.2f} tokens per step, "
        f"a gain of {tau / (v + c * k):.2f}; measured {chain.tokens_per_step.value:.2f} and {chain.speedup[0]:.2f}"
    )
assert cells["model:k=1"].tokens_per_step.value < chain.tokens_per_step.value

# %% [markdown]
# ## Let the planner choose
#
# Which `k` is best changes from text to text and from step to step. Leave `k` out and every step is planned: with
# which drafter, how deep, or plainly. Give several drafters and it chooses between them, too.

# %%
target, draft, tokenizer = specdec.load_pair("stdlib-python")
spec = specdec.Speculator(target, [draft, "ngram"])
for prompt in (
    "NAMES = {\n    1: 'one',\n    2: 'two',\n    3: 'three',\n",
    "The lighthouse keeper had not spoken to anyone for",
):
    inputs = tokenizer(prompt, return_tensors="pt")
    spec.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    print(repr(prompt[:24]), "steps by plan:", spec.report.plan.steps)
    assert sum(spec.report.plan.steps.values()) == spec.report.num_steps

# %% [markdown]
# ## Rules of thumb
#
# * A drafter with 2 to 10 % of the target's parameters, of the same family, trained on the same data or distilled
#   from the target.
# * Text that repeats its input (edits, code, JSON, summaries with quotes): add `"ngram"`; it costs next to nothing
#   where it finds nothing.
# * Large batches compute as much as they read: fewer drafted tokens pay. The planner knows the batch it is in.
# * `specdec bench --pair DIR` measures the end result on your machine. Believe that, not a formula.
