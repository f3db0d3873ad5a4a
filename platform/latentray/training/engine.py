"""One network under DeepSpeed: the only module that talks to `deepspeed`.

The forward of ZeRO engines hooks every autograd pass through its outputs, so a loss is built from one forward and ends
in one backward; what needs gradients elsewhere (the adaptive weight) takes them by other means (see stage1).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from latentray import build
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.train import Train
from latentray.errors import ConfigError, EnvironmentRefused
from latentray.training import gradient_norm, optimizers, partitions
from latentray.training.mapped import Disk
from latentray.training.partitions import Fragment, Pieces, Snapshot


def deepspeed_config(config: Train, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: derived, with `deepspeed.extra` merged over it. Pure."""
    micro, accumulation = config.micro_and_accumulation(world)
    zero: dict[str, Any] = {"stage": config.deepspeed.zero_stage}
    if config.deepspeed.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": "cpu"}  # on NVMe too: what is in memory there is mapped (`mapped.py`)
    if config.deepspeed.offload_parameters != "none":
        zero["offload_param"] = {"device": config.deepspeed.offload_parameters}
    if config.deepspeed.offload_parameters == "nvme":
        zero["offload_param"]["nvme_path"] = config.deepspeed.nvme_path
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


def require_accepted(config: Train, world: int) -> None:
    """Raise ConfigError for a value in `deepspeed.extra` that DeepSpeed refuses, before there is a worker to refuse it."""
    if not config.deepspeed.extra:
        return
    if config.cluster.device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import config as theirs

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        theirs.DeepSpeedConfig(deepspeed_config(config, world))
    except AssertionError:
        return  # some ask what this machine has, and the workers may be on others
    except (ValueError, TypeError, theirs.DeepSpeedConfigError) as error:
        raise _refused(config.deepspeed.extra, error) from None


def _refused(extra: Mapping[str, Any], error: Exception) -> ConfigError:
    """What DeepSpeed says against `extra`, at the key that it says it of where it is one of its models that does."""
    from pydantic import ValidationError

    told, where = str(error), "deepspeed.extra"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        names = [str(one) for one in first["loc"]]
        where = ".".join([where, *_path_to(names, extra)])
        told = f"{'.'.join(names)} is {first['input']!r}: {first['msg']}"
    return ConfigError(f"DeepSpeed refuses its configuration: {told}", where=where, mend="Correct or remove the value.")


def _path_to(names: Sequence[str], block: Mapping[str, Any]) -> list[str]:
    """Where in nested blocks these keys are, from the outermost on; none where they are not."""
    if names and names[0] in block:
        return list(names)
    for key, value in block.items():
        below = _path_to(names, value) if isinstance(value, Mapping) else []
        if below:
            return [key, *below]
    return []


def require_nvme(config: DeepSpeedConfig) -> None:
    """Raise EnvironmentRefused where this machine cannot keep on a disk what is to be there: no libaio, or no such disk."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if config.nvme_path is None:
        return
    if config.offload_parameters == "nvme" and not AsyncIOBuilder().is_compatible():
        raise EnvironmentRefused(
            "DeepSpeed reads and writes NVMe disks through libaio, which is not installed here.",
            where="deepspeed.offload_parameters",
            mend="Install libaio (apt-get install libaio-dev) on every node, or set deepspeed.offload_parameters=cpu.",
        )
    try:
        Path(config.nvme_path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.nvme_path).close()
    except OSError as error:
        raise EnvironmentRefused(
            f"Nothing can be kept there: {error}",
            where="deepspeed.nvme_path",
            mend="Name a folder on a disk of the node's own that can be written.",
        ) from None


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
        warnings.filterwarnings(
            "ignore", message=".*(all_gather_into|reduce_scatter)_tensor", category=FutureWarning
        )  # DeepSpeed's own
        # Its shared-memory collective is C++ that would be compiled at the first start, for one node only; gloo does it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.device = config, device
        self.veto: Callable[[Tensor], Tensor] | None = None
        """Sees every loss before its backward pass; where it makes it no number, the step is dropped (`guard.py`)."""
        self.applied = True
        """False where the last step was dropped: its gradients were no numbers."""
        self.lr_factor = (lr or config.optimizer.lr) / config.optimizer.lr
        if config.compile or config.optimizer.name == "muon":
            build.require_compiler()
        require_nvme(config.deepspeed)
        module = module.to(device)
        optimizer = optimizers.build(module, config.optimizer, muon=_deepspeed_muon)
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                model_parameters=[p for p in module.parameters() if p.requires_grad],
                optimizer=optimizer,
                config=deepspeed_config(config, world),
                dist_init_required=False,
            )
        except (ValueError, AssertionError, TypeError) as error:
            if not config.deepspeed.extra:
                raise
            raise _refused(config.deepspeed.extra, error) from None
        gradient_norm.shorten(self._zero, world)
        if config.deepspeed.zero_stage:
            partitions.clear_padding(self.fragments(), self.master_partitions())
        self._disk = Disk(config.deepspeed.nvme_path or "") if config.deepspeed.offload_optimizer == "nvme" else None
        self._move_to_disk()
        if config.compile:
            self._engine.compile()

    @property
    def dtype(self) -> torch.dtype:
        """What inputs are cast to: the parameters' own type."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss if self.veto is None else self.veto(loss))

    def step(self) -> None:
        """Step at an accumulation boundary. Gradients that are no numbers, on any rank, are dropped on all (`applied`)."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary and not self.config.deepspeed.zero_stage and not self._is_finite():
            self._engine.zero_grad()
            self._engine.micro_steps += 1
            self.applied = False
            return
        self._engine.step()
        if boundary:
            self.applied = self._engine.was_step_applied()

    def _is_finite(self) -> bool:
        """Whether all gradients are numbers, which DeepSpeed asks itself at every stage but 0; alike on all ranks there."""
        gradients = [p.grad for _, p in self._trained() if p.grad is not None]
        return bool(torch.stack(torch._foreach_norm(gradients)).sum().isfinite())

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * self.lr_factor * group.get(optimizers.LR_RATIO, 1.0)

    @property
    def gradient_norm(self) -> float:
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def master_partitions(self) -> list[Tensor]:
        """This rank's own part of the fp32 weights, flat (ZeRO 1-3), or the weights themselves (stage 0)."""
        for name in _MASTERS:
            if hasattr(self._zero, name):
                return list(getattr(self._zero, name))
        return [p for p in self.module.parameters() if p.requires_grad]

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A copy of a partition or a part of one: beside it, or on the disk where the optimizer's state lies there."""
        return tensor.detach().clone() if self._disk is None else self._disk.copy(tensor)

    def _move_to_disk(self) -> None:
        """Put the fp32 weights, their gradients and the moments that AdamW would make in memory on the disk."""
        if self._disk is None:
            return
        for flat in self.master_partitions():
            flat.data = self._disk.copy(flat.data)
            if flat.grad is not None:
                flat.grad = self._disk.copy(flat.grad)
            moments = {key: self._disk.zeros_like(flat) for key in optimizers.STATES["adamw"]}  # no other is offloaded
            self._base.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **moments}
        self._zero._link_all_hp_params()  # it keeps views of what was in memory

    def fragments(self) -> list[Fragment]:
        """Which stretch of which parameter lies where in `master_partitions`."""
        stage = self.config.deepspeed.zero_stage
        return [one for name, p in self._trained() for one in _FRAGMENTS[stage](self._zero, name, p, self._place)]

    def own_fragments(self) -> list[Fragment]:
        """`fragments`, where ranks hold the same: the share that is this rank's to write."""
        found = self.fragments()
        if self.config.deepspeed.zero_stage:
            return found
        return [one.part(dist.get_rank(), dist.get_world_size()) for one in found]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each trained parameter, whole."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._trained()}

    def optimizer_states(self) -> tuple[dict[str, list[Tensor | None]], dict[str, float]]:
        """The optimizer's tensors by name and its numbers; none before its first step.

        A list like `master_partitions` each, with None where a partition has no such state, or one that is not cut like it
        (see `_uncut_states`).
        """
        found = [self._cut_states(number, flat) for number, flat in enumerate(self.master_partitions())]
        tensors = {key: [one.get(key) for one in found] for key in dict.fromkeys(key for one in found for key in one)}
        numbers = {
            key: float(value)
            for flat in self.master_partitions()
            for key, value in self._base.state.get(flat, {}).items()
            if _is_number(value)
        }
        return tensors, numbers

    def snapshot(self, average: Sequence[Tensor] = ()) -> Snapshot:
        """A copy of this rank's share of weights and optimizer, and of an average that is cut like the weights."""
        tensors, numbers = self.optimizer_states()
        held: dict[str, Sequence[Tensor | None]] = {partitions.WEIGHT: self.master_partitions(), **tensors}
        if average:
            held[partitions.EMA] = average
        return partitions.take(self.own_fragments(), held, numbers, self._uncut_states(), copy=self.copy_of)

    def restore(self, pieces: Pieces) -> None:
        """Take weights and optimizer over from a checkpoint of any world size and ZeRO stage. Collective.

        States of another optimizer are left alone: this one begins afresh. Raises ArtifactError where the checkpoint is of
        another network.
        """
        partitions.require_same(pieces, self.shapes)
        fragments, masters = self.fragments(), self.master_partitions()
        partitions.restore(pieces, partitions.WEIGHT, fragments, masters)
        for number, flat in enumerate(masters):
            self._restore_states(pieces, number, flat, [one for one in fragments if one.partition == number])
        self.refresh()

    def _restore_states(self, pieces: Pieces, number: int, flat: Tensor, fragments: Sequence[Fragment]) -> None:
        """Fill the optimizer's state of one partition with what the checkpoint has of it."""
        by_muon = bool(self._group_of(number).get("use_muon"))
        before, found = self._base.state.pop(flat, {}), {}
        for key in optimizers.STATES[self.config.optimizer.name]:
            if by_muon == (key == optimizers.MOMENTUM):
                value = self._state_of(pieces, key, number, flat, fragments)
                if value is not None:
                    kept = torch.is_tensor(before.get(key)) and before[key].shape == value.shape
                    found[key] = before[key].copy_(value) if kept else value.to(flat.device)
        if found and "step" in pieces.scalars and not by_muon:
            fused = any(group.get("fused") for group in self._base.param_groups)
            where = flat.device if fused else "cpu"
            found["step"] = torch.tensor(pieces.scalars["step"], dtype=torch.float32, device=where)
        if found:
            self._base.state[flat] = found

    def _state_of(
        self, pieces: Pieces, key: str, number: int, flat: Tensor, fragments: Sequence[Fragment]
    ) -> Tensor | None:
        """One state of a partition from a checkpoint, None where that holds none of it."""
        for one in fragments:
            if (whole := pieces.whole(key, one.name)) is not None:
                return whole
        if key not in pieces.states:
            return None
        if self._holds_whole(number):
            return self._momentum_of(pieces, number)
        held = [dataclasses.replace(one, partition=0) for one in fragments if pieces.has(key, one.name)]
        if fragments and not held:
            return None
        value = torch.zeros_like(flat.data)
        partitions.restore(pieces, key, held, [value])
        return value

    def _cut_states(self, number: int, flat: Tensor) -> dict[str, Tensor]:
        """The optimizer's tensors that lie like a partition."""
        state = self._base.state.get(flat, {})
        if self._holds_whole(number):
            return {
                key: self._cut_momentum(number, flat, value) for key, value in state.items() if torch.is_tensor(value)
            }
        return {key: value for key, value in state.items() if _is_like(value, flat)}

    def _uncut_states(self) -> dict[str, Tensor]:
        """Factored moments (stage 0), by `<state>/<parameter>`: those that are this rank's to write."""
        if self.config.deepspeed.zero_stage:
            return {}
        mine = [
            (name, p) for name, p in self._trained() if self._place[id(p)] % dist.get_world_size() == dist.get_rank()
        ]
        return {
            f"{key}/{name}": value
            for name, p in mine
            for key, value in self._base.state.get(p, {}).items()
            if torch.is_tensor(value) and not _is_like(value, p) and not _is_number(value)
        }

    def _group_of(self, number: int) -> dict[str, Any]:
        """The group of a partition: its settings."""
        flat = self.master_partitions()[number]
        return next((one for one in self._base.param_groups if any(p is flat for p in one["params"])), {})

    def _holds_whole(self, number: int) -> bool:
        """Whether a partition's momentum is of whole matrices: DeepSpeed keeps it so on every rank that holds a part of one."""
        return bool(self.config.deepspeed.zero_stage) and bool(self._group_of(number).get("use_muon"))

    def _matrices(self, number: int) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Name, parameter and offset of the matrices whose momenta lie one after another in a partition's buffer."""
        names, offset = {id(p): name for name, p in self._trained()}, 0
        for p in self._zero.params_in_partition[number]:
            yield names[id(p)], p, offset
            offset += p.numel()

    def _cut_momentum(self, number: int, flat: Tensor, whole: Tensor) -> Tensor:
        cut, offsets = torch.zeros_like(flat.data), {name: at for name, _, at in self._matrices(number)}
        for one in self.fragments():
            if one.partition == number and one.numel:
                begin = offsets[one.name] + one.start
                cut[one.offset : one.offset + one.numel] = whole[begin : begin + one.numel]
        return cut

    def _momentum_of(self, pieces: Pieces, number: int) -> Tensor:
        empty = torch.zeros(0)
        stretches = [
            pieces.stretch(optimizers.MOMENTUM, name, 0, p.numel())
            if pieces.has(optimizers.MOMENTUM, name)
            else torch.zeros(p.numel())
            for name, p, _ in self._matrices(number)
        ]
        return torch.cat([empty, *stretches])

    def refresh(self) -> None:
        """Make the weights that the network computes with from `master_partitions`. Collective."""
        if hasattr(self._zero, "update_lp_params"):
            self._zero.update_lp_params()
        elif self.config.deepspeed.zero_stage == 3:
            for number in range(len(self._zero.fp32_partitioned_groups_flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(number)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer; at stage 0 the plain one."""
        return self._engine.optimizer

    @property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed wraps."""
        return getattr(self._zero, "optimizer", self._zero)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    @functools.cached_property
    def _place(self) -> dict[int, int]:
        """Number of each parameter among the trained ones, by identity."""
        return {id(p): number for number, (_, p) in enumerate(self._trained())}

    def full_state(self) -> dict[str, Tensor]:
        """The whole fp32 state dict of what is trained on the CPU, gathered from all ranks. Collective: all must call it.

        Frozen weights are left out: under bf16 the engine has them rounded, and they are where they came from.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state = {name: value.detach().cpu().clone() for name, value in self.module.named_buffers()}
        for name, parameter in self._trained():
            full = safe_get_full_fp32_param(parameter)
            full = parameter if full is None else full
            state[name] = full.detach().float().cpu().clone()
        return state

    def close(self) -> None:
        """Free what the engine holds, so that another can be built in this process."""
        self._engine.destroy()


def _whole(zero: Any, name: str, p: nn.Parameter, place: Mapping[int, int]) -> Iterator[Fragment]:
    """Stage 0: every rank holds every parameter."""
    yield Fragment(name=name, shape=tuple(p.shape), start=0, numel=p.numel(), partition=place[id(p)], offset=0)


def _of_flat_groups(zero: Any, name: str, p: nn.Parameter, place: Mapping[int, int]) -> Iterator[Fragment]:
    """Stages 1 and 2: groups of parameters, flattened one after another and cut into one part per rank."""
    mapping = getattr(p, "_hp_mapping", None)
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Fragment(
            name=name,
            shape=tuple(p.shape),
            start=here.start,
            numel=here.numel,
            partition=mapping.param_group_index,
            offset=there.start,
        )


def _of_each(zero: Any, name: str, p: Any, place: Mapping[int, int]) -> Iterator[Fragment]:
    """Stage 3: each parameter cut into one part per rank, the last one padded."""
    partition, offset, size = zero.grad_position[zero.get_param_id(p)]
    start = size * zero._get_param_partition_rank(p)
    numel = max(min(size, p.ds_numel - start), 0)
    yield Fragment(name=name, shape=tuple(p.ds_shape), start=start, numel=numel, partition=partition, offset=offset)


_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
"""Where DeepSpeed keeps its fp32 weights: stages 1 and 2, stage 3."""
_FRAGMENTS = {0: _whole, 1: _of_flat_groups, 2: _of_flat_groups, 3: _of_each}


def _is_like(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.ndim > 0 and value.shape == flat.shape


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (torch.is_tensor(value) and value.ndim == 0)


def _deepspeed_muon(*args: Any, **settings: Any) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(*args, **settings)
