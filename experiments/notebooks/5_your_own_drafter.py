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
# # 5. Your own drafter in 30 lines
#
# A drafter proposes; it can cost speed, never output. That makes it a good place to play. The contract has one method
# that matters, `propose`: a `DraftTree` for every running row, rooted at that row's last token.

# %%
import warnings
from collections import Counter, defaultdict

import torch

import specdec
from specdec import Drafter
from specdec.drafters import Budget, DrafterFaultWarning, Session
from specdec.experiments.corpus import held_out_prompts, training_texts
from specdec.lab.tiny import tiny_llama
from specdec.verify import DraftTree
from specdec.verify.draft_kind import DraftKind

target, draft, tokenizer = specdec.load_pair("stdlib-python")

# %% [markdown]
# ## A trigram table
#
# The oldest language model there is: after these two tokens, which one followed most often? Learned from a corpus
# beforehand, it needs no pass of any model.


# %%
class Trigram(Drafter):
    """Drafts the likeliest successor of the last two tokens, again and again."""

    name = "trigram"
    num_uniforms = 0  # draws nothing
    kind = DraftKind("chain", "deterministic")

    def __init__(self, texts, k=4):
        self.max_depth = self.max_nodes = k
        counts = defaultdict(Counter)
        for ids in texts:
            for one, two, three in zip(ids, ids[1:], ids[2:], strict=False):
                counts[one, two][three] += 1
        self.after = {pair: found.most_common(1)[0][0] for pair, found in counts.items()}

    def start(self, session: Session) -> None:
        self.session = session

    def propose(self, budget: Budget, uniforms: torch.Tensor) -> DraftTree:
        rows, runs = self.session.rows, []
        for row, depth in zip(rows.live, budget.depths, strict=True):
            depth = min(depth, self.max_depth, budget.max_nodes)
            count = rows.num_tokens[row]
            run = rows.text[row, max(0, count - 2) : count].tolist()
            while len(run) < 2 + depth and tuple(run[-2:]) in self.after:
                run.append(self.after[tuple(run[-2:])])
            runs.append(run[min(1, count - 1) :])  # the root and what was drafted after it
        width = max(map(len, runs))
        tokens = torch.tensor([run + [0] * (width - len(run)) for run in runs])
        parents = torch.arange(-1, width - 1).expand_as(tokens)
        sizes = torch.tensor([len(run) for run in runs])
        return DraftTree(tokens, parents, sizes, sampled=torch.zeros_like(tokens, dtype=torch.bool))


# %% [markdown]
# Rows may have drafts of different length: `num_nodes` says how many nodes of a row are real, the rest is padding.
# `sampled` is False everywhere, so no `q` is needed: tokens that were not drawn may be chosen in any way.
#
# The corpus is Python's standard library as it is installed here, by whole files; prompts come from files that are
# held out.

# %%
texts = tokenizer(training_texts()[::4], verbose=False).input_ids
trigram = Trigram(texts)
print(f"{sum(map(len, texts))} tokens, {len(trigram.after)} pairs of tokens")

# %% [markdown]
# ## Is it lossless? Is it any good?

# %%
for ids in held_out_prompts(tokenizer, 3, 48, seed=1):
    inputs = {"inputs": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    options = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = target.generate(**inputs, **options)
    lengths = {}
    for drafter in (trigram, specdec.NgramDrafter(k=4), specdec.ModelDrafter(draft, k=4)):
        spec = specdec.Speculator(target, drafter)
        assert torch.equal(spec.generate(**inputs, **options), plain)
        lengths[drafter.name] = spec.report.tokens_per_step
    print({name: f"{length:.2f} tokens per pass" for name, length in lengths.items()})
    assert 1 < lengths["trigram"] < lengths["model"]

# %% [markdown]
# The table is no match for a trained model, and it looks less far back than prompt lookup, which copies from the text
# itself; yet it drafts where lookup finds nothing, and costs no pass of any model. The planner can choose between
# drafters at every step: `Speculator(target, [draft, trigram])`.
#
# ## The law, too
#
# Greedy equality says nothing about sampling. `specdec.check` takes any drafter; on a model of eight tokens it has
# the power to find small errors within seconds.

# %%
tiny = tiny_llama(1, vocab=8)
sample = tiny.generate(torch.tensor([[1]]), do_sample=True, max_new_tokens=100, top_k=0, pad_token_id=0)
report = specdec.check(tiny, Trigram(sample.tolist(), k=3), budget_s=3)
print(report.summary())
assert report.passed

# %% [markdown]
# ## A drafter that fails
#
# Every drafter runs inside a guard. One that raises, or returns NaN, wrong ids or wrong shapes makes the step a plain
# one, with one warning and a count in the report. The text does not change.


# %%
class Moody(Trigram):
    def propose(self, budget, uniforms):
        if self.session.rows.num_tokens[0] % 3 == 0:
            raise RuntimeError("not now")
        return super().propose(budget, uniforms)


spec = specdec.Speculator(target, Moody(texts[:50]))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = spec.generate(**inputs, **options)
assert torch.equal(out, plain)
assert spec.report.num_drafter_faults > 0
assert [warning.category for warning in caught] == [DrafterFaultWarning]
print(spec.report.num_drafter_faults, "faults, last:", spec.report.last_drafter_fault)

# %% [markdown]
# ## If yours samples
#
# Then the tree must say what law each token was *really* drawn from: `DraftTree.build(topology, tokens, q=q)`, with
# `q` float32 `[rows, parents, vocab]`, after any temperature or filter of its own, and `uniforms` as the only
# randomness. And one rule: whether a sampled token is drafted may depend on the text before it, never on the token
# itself or on later ones. A draft that is withdrawn because of what it turned out to be biases the output. Notebook 4
# shows how such a bug is found; docs/drafters.md has the rest of the contract.
