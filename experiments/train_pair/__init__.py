"""The recipe of the small pair that ships with the library: one command trains tokenizer, target and draft.

`python -m specdec.experiments.train_pair` trains; `... evaluate --pair DIR` measures a pair;
`... export` writes out the pair of an unfinished run.
"""
