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
# # 6. From a notebook to a server
#
# What worked in a notebook becomes a *pair*: one small file that names target, drafter and how to draft. This
# library's engine serves it to many users at once; when one machine is no longer enough, the same file becomes the
# arguments of vLLM, SGLang, TensorRT-LLM or llama.cpp.

# %%
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import specdec
from specdec.pairing import Drafting, PairError, find_pair
from specdec.pairing.create import new_pair
from specdec.pairing.export import ENGINES, export_pair
from specdec.pairing.registry import pair_text
from specdec.pairing.roofline import Setting, estimate
from specdec.shipped import pair_folder

# %% [markdown]
# ## 1. Write the pair down
#
# Facts are read from the models' own files. In a shell: `specdec pairs new --target DIR --draft DIR -o mine.toml`.

# %%
folder = pair_folder("stdlib-python")
workplace = tempfile.TemporaryDirectory()
file = Path(workplace.name) / "mine.toml"
pair = new_pair(str(folder / "target"), str(folder / "draft"), "mine", drafting=Drafting(k=3), dtype="float32")
file.write_text(pair_text(pair))
print("\n".join(line for line in file.read_text().splitlines() if not line.startswith("path")))

# %% [markdown]
# A file is checked whenever it is read: unknown keys, facts that the models contradict, vocabularies that do not
# match.

# %%
wrong = file.with_name("wrong.toml")
wrong.write_text(file.read_text().replace("num_layers = 8", "num_layers = 9"))
try:
    find_pair(wrong)
except PairError as error:
    print(error)
else:
    raise AssertionError("a wrong number of layers should have been found")

# %% [markdown]
# Anybody can use it now: `specdec generate --pair mine.toml`, or

# %%
spec = specdec.Speculator.from_pair(file)
prompt = spec.tokenizer("def main(argv=None):", return_tensors="pt")
sampling = {"max_new_tokens": 32, "do_sample": True, "temperature": 0.7, "seed": 11}
alone = spec.generate(**prompt, **sampling)[0, prompt.input_ids.shape[1] :].tolist()
print(spec.tokenizer.decode(alone))

# %% [markdown]
# ## 2. Many users at once
#
# The engine batches continuously: requests join and leave at every step, prompts with a common beginning are stored
# once, memory is paged. A request's text is the one it would get alone with the same seed; its companions leave no
# trace in it.

# %%
target, draft, tokenizer = specdec.load_pair(file)
texts = ["def main(argv=None):", "class Node:", "import os\n", "for line in file:", "def main(argv=None):", "return"]
with specdec.Engine(target, draft, k=3, max_rows=4) as engine:
    handles = [engine.submit(tokenizer(text).input_ids, **{**sampling, "seed": 11 + i}) for i, text in enumerate(texts)]
    for token in handles[1]:  # tokens as they come
        print(tokenizer.decode(token), end="")
    results = [handle.result() for handle in handles]
    metrics = engine.metrics()
assert results[0].token_ids == alone
print(
    f"\n\n{metrics.num_generation_tokens} tokens for {metrics.num_finished} in {metrics.num_steps} steps of the batch,"
)
print(f"{metrics.mean_acceptance_length:.2f} tokens per draft; the numbers have vLLM's names:")
print(sorted(metrics.to_dict()))
assert metrics.num_generation_tokens > metrics.num_steps

# %% [markdown]
# ## 3. A server
#
# Handles may be waited for from any thread, so a server is a handler that submits and waits. This one needs nothing
# but Python:


# %%
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        result = engine.submit(tokenizer(asked.pop("prompt")).input_ids, **asked).result()
        answer = {
            "text": tokenizer.decode(result.token_ids),
            "tokens_per_pass": round(result.mean_acceptance_length, 2),
        }
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def ask(text, seed):
    body = json.dumps({"prompt": text, **sampling, "seed": seed}).encode()
    with urlopen(f"http://127.0.0.1:{server.server_port}", data=body) as response:
        return json.load(response)


with specdec.Engine(target, draft, k=3, max_rows=4) as engine, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    Thread(target=server.serve_forever).start()
    with ThreadPoolExecutor(len(texts)) as users:
        answers = list(users.map(ask, texts, range(11, 11 + len(texts))))
    server.shutdown()
for text, answer in zip(texts, answers, strict=True):
    print(f"{answer['tokens_per_pass']} tokens per pass: {text + answer['text'][:60]!r}")
assert answers[0]["text"] == tokenizer.decode(alone)

# %% [markdown]
# ## 4. Somewhere else
#
# The pair in the words of other engines. What does not carry over is said in the comments; a pair that an engine
# cannot run is refused, with an engine that can. (`specdec pairs export mine.toml --to vllm`; here a pair of the hub,
# whose names are the same on every machine.)

# %%
for name in ENGINES:
    try:
        print(f"--- {name}\n{export_pair(find_pair('qwen3-8b-0.6b'), name).text()}\n")
    except PairError as refusal:
        print(f"--- {name}\n{refusal}\n")

# %% [markdown]
# vLLM's part is one JSON object. The draft length is the one measured here:

# %%
arguments = export_pair(find_pair(file), "vllm").arguments
assert arguments["num_speculative_tokens"] == 3
assert arguments["method"] == "draft_model"

# %% [markdown]
# And what it may give there: an estimate from bytes and operations, not a measurement. Larger batches leave less to
# gain.

# %%
for batch in (1, 16, 64):
    result = estimate(find_pair("qwen3-8b-0.6b"), Setting(device="h200", batch=batch))
    gains = {gain.alpha: f"{gain.speedup:.2f}x" for gain in result.gains[2:5]}
    print(f"batch {batch:3d}: {result.total_gb:.0f} of {result.memory_gb:.0f} GB, gain by acceptance {gains}")
