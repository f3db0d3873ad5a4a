"""The optimizers by name, and which parameters each of them trains how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from latentray.config.optimizer import OptimizerConfig
from latentray.errors import ConfigError
from latentray.models.matrices import hidden_matrices

MOMENTUM = "momentum_buffer"
"""Muon's only state."""

STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adafactor": ("row_var", "col_var", "variance"),
    "muon": ("exp_avg", "exp_avg_sq", MOMENTUM),
}
"""Tensors that each optimizer keeps of a parameter, or of a flat partition of several."""

LR_RATIO = "lr_ratio"
"""Key of a parameter group: its learning rate, as a multiple of `optimizer.lr`."""


def build(
    module: nn.Module, config: OptimizerConfig, *, muon: Callable[..., torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """The optimizer of a network's trained parameters. `muon` is DeepSpeed's class (only the engine talks to DeepSpeed)."""
    return BUILDERS[config.name](module, config, muon)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _adam_settings(config: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def _adamw(module: nn.Module, config: OptimizerConfig, muon: Any) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019."""
    return torch.optim.AdamW(_trained(module), **_adam_settings(config), fused=True)


def _adafactor(module: nn.Module, config: OptimizerConfig, muon: Any) -> torch.optim.Optimizer:
    """Shazeer & Stern 2018: the second moment of a matrix as the product of a row and a column, and no first moment."""
    return torch.optim.Adafactor(_trained(module), lr=config.lr, weight_decay=config.weight_decay)


def _muon(module: nn.Module, config: OptimizerConfig, muon: Callable[..., torch.optim.Optimizer]) -> Any:
    """Jordan et al. 2024: hidden matrices by orthogonalised momentum, everything else by AdamW."""
    matrices = hidden_matrices(module)
    if not matrices:
        raise ConfigError(
            "The network has no hidden matrices for Muon.", where="optimizer.name", mend="Set optimizer.name=adamw."
        )
    chosen = {id(p) for p in matrices}
    for p in _trained(module):
        p.use_muon = id(p) in chosen  # what DeepSpeed asks of every parameter
    rest = [p for p in _trained(module) if id(p) not in chosen]
    groups: list[dict[str, Any]] = [
        {
            "params": matrices,
            "use_muon": True,
            "lr": config.muon_lr,
            "momentum": config.muon_momentum,
            "weight_decay": config.weight_decay,
            LR_RATIO: config.muon_lr / config.lr,
        }
    ]
    if rest:
        groups.append({"params": rest, "use_muon": False, **_adam_settings(config)})
    return muon(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


BUILDERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}
