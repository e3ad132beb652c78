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
# # 2. What acceptance looks like
#
# A step drafts a few tokens, the target checks them in one pass, and an acceptance rule keeps a prefix of them. Every
# token of the text is therefore one of three kinds:
#
# * **accepted**: drafted and kept;
# * **recovered**: the target's own, drawn after it rejected a draft;
# * **bonus**: the target's own, after everything was accepted.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import HTML, display

import specdec
from specdec.experiments.accept.measure import KIND_LETTERS
from specdec.experiments.accept.metrics import Runs
from specdec.experiments.accept.options import AcceptOptions
from specdec.experiments.accept.report.panels import panels
from specdec.experiments.accept.report.texts import marked
from specdec.experiments.accept.runner import run
from specdec.experiments.accept.scores import Logs
from specdec.experiments.accept.store import Store

target, draft, tokenizer = specdec.load_pair("stdlib-python")
spec = specdec.Speculator(target, draft, k=5)

# %% [markdown]
# ## A text, coloured
#
# `on_step` hands over a `StepTrace` after every step: what was drafted, kept and emitted, for every row.

# %%
STYLE = """<style>
pre.spec { white-space: pre-wrap; line-height: 1.5; padding: .6em }
pre.spec { background: #fbfbfb; color: #222; border: 1px solid #ddd }
pre.spec .a { background: #d4efd4 } pre.spec .r { background: #ffd9b3; font-weight: bold }
pre.spec .b { background: #d6e4fa; text-decoration: underline } pre.spec .p { color: #999 }
</style>"""
KINDS = '<span class="a">accepted</span> <span class="r">recovered</span> <span class="b">bonus</span>'
LEGEND = f'<pre class="spec">{KINDS} | ends a step</pre>'


def coloured(prompt, **options):
    """Generate 80 tokens, show where each came from, and return the report."""
    traces = []
    inputs = tokenizer(prompt, return_tensors="pt")
    out = spec.generate(
        **inputs, max_new_tokens=80, eos_token_id=None, pad_token_id=0, on_step=traces.append, **options
    )
    kinds = "".join(KIND_LETTERS[kind] for trace in traces for kind in trace.kinds[0])
    turn = {"token_ids": out[0, inputs.input_ids.shape[1] :].tolist(), "kinds": kinds}
    assert len(turn["token_ids"]) == len(kinds)
    display(HTML(STYLE + LEGEND + f'<pre class="spec">{marked(turn, tokenizer)}</pre>'))
    print(f"{spec.report.num_steps} steps, {spec.report.tokens_per_step:.2f} tokens per step")
    return spec.report


PROMPT = "def parse_args(argv=None):\n"
greedy = coloured(PROMPT, do_sample=False)

# %% [markdown]
# Long green runs are what makes generation fast: up to five drafted tokens and a bonus for one pass of the target.
# Orange marks the places where the two models disagree;
# the text goes on from there with the target's own token.
#
# Small models repeat themselves when they always take the likeliest token, and a text that repeats itself is easy to
# draft. Sampled text is harder. A drafted token `x` is kept with probability `min(1, p(x)/q(x))`, so what counts is
# how much the two laws overlap, not whether they agree on the likeliest token:

# %%
sampled = coloured(PROMPT, do_sample=True, temperature=0.8, top_k=0, seed=3)
assert sampled.mean_acceptance_length < greedy.mean_acceptance_length

# %% [markdown]
# ## By position
#
# The rate at a position is conditional on the position being reached: of the drafts whose first two tokens were kept,
# how many kept the third? The curve is often flat or even *rises*, because a draft that came this far is in an easy
# stretch of text. The histogram shows the same steps as a distribution: many keep nothing or everything. More
# temperature is not simply worse: it flattens both laws.

# %%
batch = tokenizer(
    [PROMPT, "import os\nimport sys\n", "class Queue:\n    def put(self, item):\n", "    for key, value in"],
    return_tensors="pt",
    padding=True,
    padding_side="left",
)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for number, temperature in enumerate((0.0, 0.8, 1.5)):
    law = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": 1} if temperature else {"do_sample": False}
    )
    spec.generate(**batch, max_new_tokens=64, eos_token_id=None, pad_token_id=0, **law)
    rates, histogram = spec.report.per_position_acceptance, spec.report.acceptance_histogram
    left.plot(range(1, len(rates) + 1), rates, marker="o", label=f"T = {temperature:g}")
    steps = sum(histogram)
    right.bar(
        [at + 0.27 * (number - 1) for at in range(len(histogram))], [count / steps for count in histogram], width=0.25
    )
    assert steps == spec.report.num_drafts
left.set(xlabel="depth in the draft", ylabel="kept, once reached", ylim=(0, 1.03), xticks=range(1, 6))
right.set(xlabel="accepted tokens of a step", ylabel="share of steps")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The whole experiment
#
# `specdec accept` measures settings × rules × temperatures × prompts and writes a report. The same from Python, small
# enough for a notebook: chains of four, a tree with two children at its root, and n-grams, greedy and sampled.

# %%
workplace = tempfile.TemporaryDirectory()
folder = Path(workplace.name)
options = AcceptOptions(
    out=folder,
    settings=("model:k=4", "model:tree=2,1,1:children=mixed", "ngram:k=6"),
    max_rules=1,
    temperatures=(0.0, 1.0),
    prompts=("shipped",),
    num_prompts=3,
    new_tokens=24,
    log=False,
    report=False,
    threads=torch.get_num_threads(),
)
assert run(options) == 0

# %% [markdown]
# Its plots, chosen by name. A picture of three short prompts is a sketch; `specdec accept` itself takes more of them
# and says how sure it is.

# %%
store = Store(folder)
drawn = {panel.title: panel for panel in panels(Runs.read(store), Logs(store))}
widths = {"Acceptance by position": 11, "Where in the tree the kept tokens lie": 5, "Acceptance against the optimum": 9}
for title, width in widths.items():
    print(f"{title}. {drawn[title].note}")
    drawn[title].draw(plt.figure(figsize=(width, drawn[title].height), layout="constrained"))
    plt.show()
