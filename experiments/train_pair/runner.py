"""Open a run and take it from where it stands to its end."""

from __future__ import annotations

from pathlib import Path

import torch

from specdec.experiments.train_pair.joint import run_joint_phase
from specdec.experiments.train_pair.on_policy import run_on_policy_phase
from specdec.experiments.train_pair.recipe import Recipe
from specdec.experiments.train_pair.session import Session
from specdec.experiments.train_pair.state import JOINT, ON_POLICY, TrainingState


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        ValueError: if CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device for --device cuda, found none; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def open_state(recipe: Recipe, out: Path, device: str, threads: int | None, *, resume: bool) -> TrainingState:
    """The state of the run in `out` (see `TrainingState.create`)."""
    if threads is not None:
        torch.set_num_threads(threads)
    return TrainingState.create(recipe, out, pick_device(device), resume=resume)


def train(state: TrainingState, session: Session, *, compile_layers: bool = False) -> None:
    """Take all steps that are left, of both phases."""
    if state.phase == JOINT:
        run_joint_phase(state, session, compile_layers=compile_layers)
    if state.phase == ON_POLICY:
        run_on_policy_phase(state, session)
