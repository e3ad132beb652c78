"""The exactness lab: does this pair, on this machine, follow the target's law?"""

from specdec.lab.check import check
from specdec.lab.findings import CheckReport, Finding

__all__ = ["CheckReport", "Finding", "check"]
