"""How a pass attends: the one function registered with `transformers`, folded SDPA, and the plans of passes that know
more than a mask says."""

if __name__ != "specdec.verify.attention":
    raise ImportError(f"import specdec.verify.attention, not `{__name__}`")
