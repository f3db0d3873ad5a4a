"""One network under DeepSpeed: the only module that talks to `deepspeed`.

The forward of ZeRO engines hooks every autograd pass through its outputs, so a loss is built from one forward and ends
in one backward; what needs gradients elsewhere (the adaptive weight) takes them by other means (see stage1).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentray.config.optimizer import OptimizerConfig
from latentray.config.train import Train
from latentray.errors import ArtifactError, ConfigError


def deepspeed_config(config: Train, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: derived, with `deepspeed.extra` merged over it. Pure."""
    micro, accumulation = config.micro_and_accumulation(world)
    zero: dict[str, Any] = {"stage": config.deepspeed.zero_stage}
    if config.deepspeed.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": config.deepspeed.offload_optimizer}
    if config.deepspeed.offload_parameters != "none":
        zero["offload_param"] = {"device": config.deepspeed.offload_parameters}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        derived["bf16"] = {"enabled": True}
    if config.precision == "autocast":
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return _merged(derived, config.deepspeed.extra)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


class Engine:
    """A network with its optimizer, sharded as the configuration says. All ranks build and call it alike."""

    def __init__(
        self, module: nn.Module, config: Train, *, world: int, device: torch.device, lr: float | None = None
    ) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)  # DeepSpeed's own
        # Its shared-memory collective is C++ that would be compiled at the first start, for one node only; gloo does it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.device = config, device
        self.lr_factor = (lr or config.optimizer.lr) / config.optimizer.lr
        module = module.to(device)
        parameters = [p for p in module.parameters() if p.requires_grad]
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                model_parameters=parameters,
                optimizer=_adamw(parameters, config.optimizer, device),
                config=deepspeed_config(config, world),
                dist_init_required=False,
            )
        except (ValueError, AssertionError, TypeError) as error:
            if not config.deepspeed.extra:
                raise
            raise ConfigError(
                f"DeepSpeed refuses its configuration: {error}",
                where="deepspeed.extra",
                mend="Correct or remove the block.",
            ) from None

    @property
    def dtype(self) -> torch.dtype:
        """What inputs are cast to: the parameters' own type."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> bool:
        """Step at an accumulation boundary; True where the weights moved."""
        boundary = bool(self._engine.is_gradient_accumulation_boundary())
        self._engine.step()
        return boundary

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * self.lr_factor

    @property
    def gradient_norm(self) -> float:
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def master_partitions(self) -> list[Tensor]:
        """This rank's own part of the fp32 weights, flat (ZeRO 1-3), or the weights themselves (stage 0)."""
        optimizer = self._engine.optimizer
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            if hasattr(optimizer, name):
                return list(getattr(optimizer, name))
        return [p.data for p in self.module.parameters() if p.requires_grad]

    def full_state(self) -> dict[str, Tensor]:
        """The whole fp32 state dict on the CPU, gathered from all ranks. Collective: every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = {name: value.detach().cpu().clone() for name, value in self.module.named_buffers()}
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            full = parameter if full is None else full
            state[name] = full.detach().float().cpu().clone()
        return state

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's part of a checkpoint below a local folder. Collective."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read a checkpoint that `save` wrote, whose manifest was verified. Collective.

        Raises ArtifactError where DeepSpeed finds nothing there: it would train on from scratch.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ArtifactError(
                "DeepSpeed could not read the checkpoint.",
                where=str(folder),
                mend="Remove it; the one before is used then.",
            )

    def close(self) -> None:
        """Free what the engine holds, so that another can be built in this process."""
        self._engine.destroy()


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
