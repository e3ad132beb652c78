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
# # 1. Drop-in `generate`
#
# First two models with one tokenizer, loaded as you always load them. Here the pair of small ones that ships with the
# library: a target of 14 M parameters that has learned to write Python-like text, and a drafter of 1.6 M.

# %%
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.shipped import pair_folder

folder = pair_folder("stdlib-python")
tokenizer = AutoTokenizer.from_pretrained(folder / "target")
target = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
draft = AutoModelForCausalLM.from_pretrained(folder / "draft", dtype=torch.float32)

# %% [markdown]
# ## Five lines

# %%
import specdec

spec = specdec.Speculator(target, draft)
inputs = tokenizer("def parse_args(argv=None):", return_tensors="pt")
out = spec.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(out[0]))

# %% [markdown]
# ## The same text, in fewer passes
#
# Speculation changes how fast the text comes, never what it says. Plain `generate` of `transformers` writes the same
# tokens:

# %%
plain = target.generate(**inputs, max_new_tokens=64, do_sample=False)
assert torch.equal(out, plain)

# %% [markdown]
# The report says what happened. *Mean acceptance length* is the number of tokens per pass of the target; plain
# decoding has 1. Nobody said how many tokens to draft: every step was planned from what steps cost on this machine
# (the first call measures that, once, which is why it was slow) and from how often drafts had been accepted. Where
# drafts do not pay, the planner decodes plainly and says so.

# %%
print(spec.report.summary())

# %% [markdown]
# `k=` fixes the length of the drafts and switches the planner off:

# %%
spec = specdec.Speculator(target, draft, k=4)
assert torch.equal(spec.generate(**inputs, max_new_tokens=64, do_sample=False), plain)
report = spec.report
print(f"{report.num_emitted_tokens} tokens in {report.num_steps} passes: {report.tokens_per_step:.2f} per pass")
assert report.num_steps < 64

# %% [markdown]
# ## Sampling, batches, and a seed
#
# All arguments of `generate` mean what they always mean: temperature, top-p, processors, stop strings, output
# objects, any batch size with left padding. `seed=` makes sampling reproducible without touching torch's global
# generator.

# %%
prompts = ["import os\n", "class Queue:\n    def put(self, item):", "for line in"]
batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 7}
first = spec.generate(**batch, **options)
for text in tokenizer.batch_decode(first, skip_special_tokens=True):
    print(repr(text))
assert torch.equal(first, spec.generate(**batch, **options))

# %% [markdown]
# An accepted run is cut where plain decoding would have stopped, also in the middle of a draft:

# %%
stopped = {"max_new_tokens": 64, "do_sample": False, "stop_strings": "\n\n", "tokenizer": tokenizer}
assert torch.equal(spec.generate(**inputs, **stopped), target.generate(**inputs, **stopped))

# %% [markdown]
# ## Code that you do not own
#
# Hugging Face's own hook, and a patch for whatever calls `target.generate`: pipelines, evaluation harnesses, other
# libraries.

# %%
assert torch.equal(target.generate(**inputs, max_new_tokens=64, do_sample=False, custom_generate=spec), plain)

with specdec.patch(target, draft, k=4) as patched:
    assert torch.equal(target.generate(**inputs, max_new_tokens=64, do_sample=False), plain)
print(f"inside the patch: {patched.report.tokens_per_step:.2f} tokens per pass")

# %% [markdown]
# ## No second model
#
# `"ngram"` proposes what followed the last few tokens when they occurred before: free, and good at text that repeats
# itself.

# %%
ngram = specdec.Speculator(target, "ngram", k=8)
imports = tokenizer("import os\nimport sys\n", return_tensors="pt")
out = ngram.generate(**imports, max_new_tokens=48, do_sample=False)
assert torch.equal(out, target.generate(**imports, max_new_tokens=48, do_sample=False))
print(f"n-grams: {ngram.report.tokens_per_step:.2f} tokens per pass")
assert ngram.report.mean_acceptance_length > 1.5

# %% [markdown]
# What cannot be honoured is refused by name, before any work:

# %%
try:
    spec.generate(**inputs, max_new_tokens=8, num_beams=4)
except specdec.UnsupportedArgumentError as refusal:
    print(refusal)
else:
    raise AssertionError("beams should have been refused")
