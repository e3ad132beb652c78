"""Muon for hidden matrices, AdamW for embeddings and norms.

Own Muon rather than `torch.optim.Muon`: that one orthogonalises in bfloat16, which CPUs without bf16 units emulate
slowly, and one matrix at a time; this one works in float32 on stacks of equal shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalise(stack: Tensor) -> Tensor:
    """Push the singular values of stack[n, rows, cols] towards 1 by quintic Newton-Schulz steps (rows <= cols).

    `X <- aX + (bA + cA^2)X` with `A = XX^T`; Jordan et al., "Muon" (2024), section "Newton-Schulz".
    """
    a, b, c = COEFFICIENTS
    x = stack / stack.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the step's RMS is 0.2 * lr, that of a typical AdamW step.

    The scale is Liu et al., "Muon is scalable for LLM training" (2025), eq. 4.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        if any(parameter.ndim != 2 for parameter in parameters):
            raise ValueError("expected matrices only; give vectors and embeddings to AdamW")
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: nothing here needs one
        """One update; matrices of the same shape (transposed where tall) are orthogonalised together."""
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                wide = update if update.shape[0] <= update.shape[1] else update.mT
                stacks.setdefault(tuple(wide.shape), []).append((parameter, wide))
            for shape, members in stacks.items():
                steps = orthogonalise(torch.stack([wide for _, wide in members]))
                scale = 0.2 * max(shape) ** 0.5
                for (parameter, _), step in zip(members, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(step if step.shape == parameter.shape else step.mT, alpha=-group["lr"] * scale)


def adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=weight_decay, fused=True)


class PairOptimizer:
    """The optimizers of one model behind one learning-rate factor, with a flat state for checkpoints."""

    def __init__(self, model: nn.Module, kind: str, hidden_lr: float, other_lr: float, weight_decay: float):
        self.named = dict(model.named_parameters())  # tied weights appear once
        matrices = [n for n, p in self.named.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        others = [name for name in self.named if name not in set(matrices)]
        hidden: torch.optim.Optimizer
        if kind == "muon":
            hidden = Muon([self.named[n] for n in matrices], lr=hidden_lr, weight_decay=weight_decay)
        else:
            hidden = adamw([self.named[n] for n in matrices], hidden_lr, weight_decay)
        rest = adamw([self.named[n] for n in others], other_lr, 0.0)
        self.parts = [(hidden, hidden_lr), (rest, other_lr)]

    def step(self, factor: float, max_norm: float = 1.0) -> None:
        """Clip, update with `factor` times the base learning rates, clear the gradients."""
        nn.utils.clip_grad_norm_(list(self.named.values()), max_norm)
        for optimizer, base in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """`{parameter/key: tensor}` of everything the optimizers remember."""
        tensors = {}
        for name, parameter in self.named.items():
            for optimizer, _ in self.parts:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}/{key}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        owner = {p: optimizer for optimizer, _ in self.parts for g in optimizer.param_groups for p in g["params"]}
        for label, value in tensors.items():
            name, key = label.rsplit("/", 1)
            parameter = self.named[name]
            # `step` counters stay on the CPU unless fused; moving them with the parameter is right for fused AdamW.
            owner[parameter].state[parameter][key] = value.to(parameter.device).clone()
