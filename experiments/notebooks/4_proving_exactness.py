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
# # 4. Proving exactness
#
# "The same law" is a claim that can be tested. This notebook does it three times: for one token by hand, for whole
# texts of the real `generate`, and with the library's own lab. Every test is shown to *fail* on a planted bug: a test
# that cannot fail proves nothing.

# %%
import matplotlib.pyplot as plt
import torch

import specdec
from specdec.experiments.laws.false_drafters import TellsRawLaw
from specdec.lab.reference import Reference
from specdec.lab.stats import detectable_tv, g_test
from specdec.lab.tiny import noisy_copy, tiny_llama

# %% [markdown]
# ## One token
#
# Draw `x` from the drafter's law `q`. Keep it with probability `min(1, p(x)/q(x))`; otherwise draw from the residual
# `max(p - q, 0)`, normalised. A token `y` then comes out with probability
# `min(p(y), q(y)) + max(p(y) - q(y), 0) = p(y)`, whatever `q` is.

# %%
generator = torch.Generator().manual_seed(0)
p = torch.tensor([0.35, 0.25, 0.20, 0.12, 0.08], dtype=torch.float64)
q = torch.tensor([0.10, 0.45, 0.15, 0.05, 0.25], dtype=torch.float64)
n = 200_000
drafted = torch.multinomial(q, n, replacement=True, generator=generator)
kept = torch.rand(n, generator=generator, dtype=torch.float64) < (p / q)[drafted]
residual = (p - q).clamp(min=0)
recovered = torch.multinomial(residual / residual.sum(), n, replacement=True, generator=generator)
emitted = torch.where(kept, drafted, recovered)

counts = torch.bincount(emitted, minlength=5)
print(f"kept {kept.double().mean():.3f} of the drafts; theory says sum min(p, q) = {torch.minimum(p, q).sum():.3f}")
print("emitted ", [f"{share:.4f}" for share in (counts / n).tolist()])
print("p       ", [f"{share:.4f}" for share in p.tolist()])
assert g_test(counts.numpy(), p.numpy()).p_value > 1e-6

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
axes.bar(range(5), torch.minimum(p, q), label="accepted: min(p, q)", color="#5ba3d9")
axes.bar(range(5), residual, bottom=torch.minimum(p, q), label="recovered: max(p - q, 0)", color="#f0a860")
axes.plot(range(5), counts / n, "ks", markersize=5, label="emitted")
axes.set(xlabel="token", ylabel="probability", xticks=range(5))
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Whole texts
#
# A random Llama with four tokens is small enough to write down the probability of *every* text of three tokens: 64 of
# them. Plain `transformers` computes that law; nothing of this library's passes, cache or rules is in it.

# %%
target = tiny_llama(3, vocab=4)
draft = noisy_copy(target, 4, noise=0.3)
prompt = torch.tensor([[3, 1, 2, 3, 1, 0, 3]])
sampling = {"temperature": 0.8, "top_k": 0}
every_text = torch.cartesian_prod(*[torch.arange(4)] * 3)
law = torch.ones(64, dtype=torch.float64)
for position in Reference(target, prompt, sampling).along(every_text):
    law *= position.law.gather(1, every_text[:, position.place, None])[:, 0]
assert abs(law.sum() - 1) < 1e-12

# %% [markdown]
# Now 6,000 texts by the real `generate`, with a drafter that is wrong about as often as it is right. They are five
# tokens long, so that texts end within and between steps. We count the first three.

# %%
TEXTS = 6_000


def texts_by(drafter):
    spec = specdec.Speculator(target, drafter)
    out = spec.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_return_sequences=TEXTS,
        max_new_tokens=5,
        do_sample=True,
        eos_token_id=None,
        pad_token_id=0,
        seed=1,
        **sampling,
    )
    assert spec.report.num_drafter_faults == 0
    print(f"{spec.report.rule}: {spec.report.mean_acceptance_length:.2f} tokens per step")
    numbers = out[:, prompt.shape[1] :][:, :3] @ torch.tensor([16, 4, 1])
    return torch.bincount(numbers, minlength=64)


honest = texts_by(specdec.ModelDrafter(draft, k=3, temperature=0.7))
test = g_test(honest.numpy(), law.numpy())
print(f"p = {test.p_value:.3f}; a law further away than TV {detectable_tv(test.df, TEXTS, 1e-6):.3f} would be seen")
assert test.p_value > 1e-6

# %% [markdown]
# ## The negative control
#
# The classical bug: a drafter that *samples* with a temperature and *reports* the law before it. `q` must be the law
# that was really sampled from. Nothing looks wrong in the text, and as many drafts are accepted as before. The test
# sees it at once:

# %%
lying = texts_by(TellsRawLaw(draft, k=3, temperature=0.7))
bug = g_test(lying.numpy(), law.numpy())
print(f"p = {bug.p_value:.1e}")
assert bug.p_value < 1e-6

figure, panels = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharex=True, sharey=True)
for axes, counts, title in zip(panels, (honest, lying), ("honest drafter", "drafter that misreports q"), strict=True):
    deviation = (counts - TEXTS * law) / (TEXTS * law * (1 - law)).sqrt()
    axes.axhspan(-3, 3, color="#d4efd4")
    axes.plot(law, deviation, "o", color="#333333", markersize=4)
    axes.set(title=title, xlabel="probability of the text", xscale="log")
panels[0].set_ylabel("observed - expected,\nin standard errors")
plt.show()

# %% [markdown]
# On the left nearly all 64 texts lie within three standard errors (the green band), as chance alone would have them.
# On the right likely and unlikely texts are off in a pattern.

# %% [markdown]
# ## Greedy text, bit for bit
#
# At temperature 0 the law is one token, and the promise is equality. In floating point a pass over five tokens
# differs from five passes over one in the last bits, so that a near-tie may fall the other way; `exactness="strict"`
# excludes that: every token's logits are the same bits whatever was drafted around it.

# %%
big, small, tokenizer = specdec.load_pair("stdlib-python")
inputs = tokenizer("class Stack:\n    def push(self, item):", return_tensors="pt")
plain = big.generate(**inputs, max_new_tokens=20, do_sample=False)
for settings in ({"k": 2}, {"k": 5}, {"tree": (2, 2, 1)}):
    assert torch.equal(
        specdec.Speculator(big, small, **settings).generate(**inputs, max_new_tokens=20, do_sample=False), plain
    )

scores = []
for drafter, settings in ((small, {"k": 4}), ("ngram", {"k": 4}), (None, {})):
    strict = specdec.Speculator(big, drafter, exactness="strict", **settings)
    out = strict.generate(
        **inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    scores.append(torch.stack(out.logits[1:]))  # the first token's logits are the prompt's
assert all(torch.equal(scores[0], other) for other in scores[1:])
print("strict mode: the logits of every token are the same bits with a model, with n-grams and without a drafter")

# %% [markdown]
# ## The same text for the same seed
#
# With the rule `coupled` sampled text is a function of target and seed: the drafter only decides how fast it comes.

# %%
coupled = [
    specdec.Speculator(big, drafter, rule="coupled").generate(**inputs, max_new_tokens=24, do_sample=True, seed=5)
    for drafter in (specdec.ModelDrafter(small, k=4), specdec.NgramDrafter(k=6), None)
]
assert all(torch.equal(text, coupled[0]) for text in coupled)
print(tokenizer.decode(coupled[0][0]))

# %% [markdown]
# ## Your own pair
#
# `specdec.check(target, draft)`, or `specdec check --pair DIR` in a shell, does all of this and more: near-ties told
# from bugs, K/V after random histories against fresh prefills, sampled laws against plain sampling, acceptance
# against theory. `budget_s` is time to spend; "see TV" in a finding says how small an error it would have seen.

# %%
report = specdec.check(target, draft, k=3, budget_s=2)
print(report.summary())
assert report.passed

# %% [markdown]
# And the liar again:

# %%
report = specdec.check(target, TellsRawLaw(draft, k=3, temperature=0.5), budget_s=6)
print(report.summary())
assert not report.passed
