"""What acceptance is measured on: prompts of our own, held-out library files, Spec-Bench and SPEED-Bench files.

Importing this package imports no torch.
"""

from __future__ import annotations

from specdec.experiments.workloads.sources import SOURCES, Source
from specdec.prompt_files import Prompt, WorkloadError, read_prompts

__all__ = ["SOURCES", "Prompt", "Source", "WorkloadError", "read_prompts"]
