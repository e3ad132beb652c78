"""What acceptance is measured on: prompts of our own, held-out library files, Spec-Bench and SPEED-Bench files.

Importing this package imports no torch.
"""

from __future__ import annotations

from specdec.experiments.workloads.sources import SOURCES, Source, chosen_sources
from specdec.prompt_files import Prompt, WorkloadError, read_prompts

__all__ = ["SOURCES", "Prompt", "Source", "WorkloadError", "chosen_sources", "read_prompts"]
