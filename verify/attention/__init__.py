"""Tree attention behind one function: interchangeable backends, a measured choice between them, and a reference."""

if __name__ != "specdec.verify.attention":
    raise ImportError(f"import specdec.verify.attention, not `{__name__}`")
