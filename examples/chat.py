"""A conversation: the model's chat template where it has one, and the text as it comes.

python examples/chat.py                 # the small pair that ships with the library; it completes code
python examples/chat.py FOLDER_OR_ID    # your model, drafted for by n-grams of the conversation
"""

import sys

from transformers import TextStreamer

import specdec


def main() -> None:
    if len(sys.argv) == 2:
        spec = specdec.Speculator(sys.argv[1], "ngram")
    else:
        spec = specdec.Speculator.from_pair("stdlib-python")
    tokenizer = spec.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns = []
    for question in ("def read(path):", "def write(path, text):"):
        print(f"\n> {question}")
        turns.append({"role": "user", "content": question})
        if tokenizer.chat_template:
            text = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = tokenizer.apply_chat_template(turns, **text)
        else:
            inputs = tokenizer("\n".join(turn["content"] for turn in turns), return_tensors="pt")
        inputs = inputs.to(spec.target.device)
        out = spec.generate(**inputs, max_new_tokens=48, do_sample=True, temperature=0.7, seed=0, streamer=streamer)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": answer})
        print(f"({spec.report.tokens_per_second:.0f} tokens per second)")


if __name__ == "__main__":
    main()
