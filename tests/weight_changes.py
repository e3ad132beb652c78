"""Ways in which a model's weights come to be others, and adapters to try them on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import torch
from engine_cases import FAMILY
from torch import Tensor, nn

PROMPT = [3 + (7 * i) % 37 for i in range(30)]
Change = Callable[[Any], object]


class Adapted(nn.Module):
    """A linear layer with low-rank adapters, on the surface that adapter libraries have in common."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(base.out_features)
        for name in ("one", "two"):
            down = torch.randn(2, base.in_features, generator=generator, dtype=torch.float64)
            up = torch.randn(base.out_features, 2, generator=generator, dtype=torch.float64)
            self.register_parameter(f"down_{name}", nn.Parameter(0.3 * down))
            self.register_parameter(f"up_{name}", nn.Parameter(0.3 * up))
        self.scaling = {"one": 1.0, "two": 1.0}
        self.merged_adapters: list[str] = []
        self._active_adapter = ["one"]
        self._disable_adapters = False

    def delta(self, name: str) -> Tensor:
        return self.scaling[name] * getattr(self, f"up_{name}") @ getattr(self, f"down_{name}")

    def merge(self) -> None:
        for name in self._active_adapter:
            self.base_layer.weight.data += self.delta(name)
            self.merged_adapters.append(name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        if self._disable_adapters:
            return out
        return out + sum(x @ self.delta(name).T for name in self._active_adapter if name not in self.merged_adapters)


def adapted(model: Any) -> list[Adapted]:
    return [part for part in model.modules() if isinstance(part, Adapted)]


def target(with_adapters: bool = False) -> Any:
    model: Any = copy.deepcopy(models.target(FAMILY))
    if with_adapters:
        for layer in model.model.layers:
            layer.self_attn.v_proj = Adapted(layer.self_attn.v_proj)
    return model.eval()


def every(model: Any, write: Callable[[Any], object]) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            write(weight)


def others(model: Any) -> dict[str, Tensor]:
    """Weights of another seed."""
    return models.target(FAMILY, seed=5).state_dict()


def inference(model: Any) -> None:
    with torch.inference_mode():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)


def optimise(model: Any, **options: Any) -> None:
    weights = list(model.parameters())
    optimiser = torch.optim.AdamW(weights, lr=0.1, **options)
    with torch.enable_grad():
        model(torch.tensor([PROMPT])).logits.logsumexp(-1).sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def replace(model: Any) -> None:
    projection = model.model.layers[0].self_attn.v_proj
    projection.weight = nn.Parameter(-projection.weight.detach())


def point_elsewhere(model: Any) -> None:
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = -weight.data


def module(model: Any) -> None:
    model.model.layers[1].self_attn = copy.deepcopy(models.target(FAMILY, seed=5).model.layers[1].self_attn)


def steer(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda part, args, out: 3 * out)


CHANGES: dict[str, Change] = {
    "in place": lambda model: every(model, lambda weight: weight.mul_(1.1)),
    "in inference mode": inference,
    "load_state_dict": lambda model: model.load_state_dict(others(model)),
    "load_state_dict, assigned": lambda model: model.load_state_dict(copy.deepcopy(others(model)), assign=True),
    "data assigned": point_elsewhere,
    "data copied into": lambda model: every(model, lambda weight: weight.data.copy_(-weight)),
    "a view written to": lambda model: every(model, lambda weight: weight.detach().numpy().__imul__(1.1)),
    "an optimiser": optimise,
    "a fused optimiser": lambda model: optimise(model, fused=True),
    "a parameter replaced": replace,
    "a module replaced": module,
    "another dtype": lambda model: model.to(torch.float32),
    "a hook": steer,
}


def merge(part: Adapted) -> None:
    part.merge()
    part._active_adapter.clear()


ADAPTERS: dict[str, Callable[[Adapted], object]] = {
    "switched": lambda part: setattr(part, "_active_adapter", ["two"]),
    "both": lambda part: part._active_adapter.extend(["two"]),
    "off": lambda part: setattr(part, "_disable_adapters", True),
    "another scale": lambda part: part.scaling.update(one=-2.0),
    "merged": merge,
}


def take_out(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.v_proj = layer.self_attn.v_proj.base_layer


def change_of(name: str) -> Change:
    if not name.startswith("adapters "):
        return CHANGES[name]
    if name == "adapters taken out":
        return take_out
    return lambda model: list(map(ADAPTERS[name.removeprefix("adapters ")], adapted(model)))
