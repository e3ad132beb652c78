"""Generate with a draft model, as plain `generate` would, and see where the tokens came from.

python examples/drop_in.py                        # the small pair that ships with the library
python examples/drop_in.py FOLDER_OR_ID ANOTHER   # your target and draft
"""

import sys

import specdec


def main() -> None:
    if len(sys.argv) == 3:
        spec = specdec.Speculator(sys.argv[1], sys.argv[2])
    else:
        spec = specdec.Speculator.from_pair("stdlib-python")
    tokenizer = spec.tokenizer
    inputs = tokenizer("def parse_args(argv=None):", return_tensors="pt").to(spec.target.device)

    out = spec.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))
    print(spec.report.summary())

    plain = spec.target.generate(**inputs, max_new_tokens=64, do_sample=False)
    print("equal to plain generate:", out.tolist() == plain.tolist())


if __name__ == "__main__":
    main()
