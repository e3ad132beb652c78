"""Benchmarks, acceptance-rate runs and training recipes, so that an installed user has them too."""

if __name__ != "specdec.experiments":
    raise ImportError(
        f"this package is imported as `specdec.experiments`, not as `{__name__}`: import specdec.experiments"
    )
