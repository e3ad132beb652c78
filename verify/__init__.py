"""Draft trees, the tree-masked forward pass, the sampling law, noise and acceptance rules."""

if __name__ != "specdec.verify":
    raise ImportError(f"this package is imported as `specdec.verify`, not as `{__name__}`: import specdec.verify")

from specdec.verify.law import SamplingLaw
from specdec.verify.noise import Noise, NoiseStream, uniform
from specdec.verify.passes.forward import Forward
from specdec.verify.rows import Rows
from specdec.verify.rules import RULES, AcceptanceRule, make_rule
from specdec.verify.topology import Topology
from specdec.verify.tree import DraftTree, Verdict

__all__ = [
    "RULES",
    "AcceptanceRule",
    "DraftTree",
    "Forward",
    "Noise",
    "NoiseStream",
    "Rows",
    "SamplingLaw",
    "Topology",
    "Verdict",
    "make_rule",
    "uniform",
]
