"""Group `deepspeed`: what latentray does not derive of DeepSpeed's configuration, checked before a worker starts.

The tables are those of DeepSpeed 0.19 (a test holds them against the version that is installed): this module is read where
DeepSpeed is not installed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from latentray.errors import ConfigError

STAGES = (0, 1, 2, 3)
DEVICES = ("none", "cpu", "nvme")

DERIVED = {
    "train_batch_size": "global_batch_size and micro_batch_size",
    "train_micro_batch_size_per_gpu": "global_batch_size and micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "managed_gradient_accumulation": "micro_batch_size",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.decay",
    "fp16": "precision=bf16 or precision=autocast",
    "bfloat16": "precision=bf16",
}
"""Blocks that latentray makes itself -> the settings they are made of."""

REMOVED = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
)
"""Blocks of older versions, which DeepSpeed no longer has."""

_ZERO = (
    "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
    "allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint offload_param "
    "offload_optimizer zenflow sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
    "stage3_max_live_parameters stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
    "stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients "
    "parameter_alignment zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights "
    "zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
    "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module"
)
_OFFLOAD_OPTIMIZER = (
    "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload "
    "cpuadam_cores_perc"
)
_OFFLOAD_PARAMETERS = ("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory")
_COMPILE = (
    "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation offload_activation_pin_memory "
    "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce sync_after_reduce "
    "sync_before_allgather sync_after_allgather keep_int_input_tensors keep_all_input_tensors passes"
)

KINDS: dict[str, dict[str, type]] = {
    "": {
        "dataloader_drop_last": bool,
        "disable_allgather": bool,
        "disable_python_gc": bool,
        "dump_state": bool,
        "memory_breakdown": bool,
        "prescale_gradients": bool,
        "steps_per_print": int,
        "vocabulary_size": int,
        "wall_clock_breakdown": bool,
        "zero_allow_untested_optimizer": bool,
        "zero_force_ds_cpu_optimizer": bool,
    },
    "activation_checkpointing": {
        "partition_activations": bool,
        "contiguous_memory_optimization": bool,
        "cpu_checkpointing": bool,
        "number_checkpoints": int,
        "synchronize_checkpoint_boundary": bool,
        "profile": bool,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
}
"""Of values that DeepSpeed takes unseen: block -> its keys, and what each is; without a block those that are in none."""
_WANTED = {int: "a whole number", bool: "true or false"}

BLOCKS: dict[str, tuple[str, ...] | None] = {
    "zero_optimization": tuple(_ZERO.split()),
    "zero_optimization.offload_optimizer": tuple(_OFFLOAD_OPTIMIZER.split()),
    "zero_optimization.offload_param": _OFFLOAD_PARAMETERS,
    "compile": tuple(_COMPILE.split()),
    "bf16": (
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "flops_profiler": (
        "enabled",
        "recompute_fwd_factor",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
    ),
    "activation_checkpointing": tuple(KINDS["activation_checkpointing"]),
    "aio": tuple(KINDS["aio"]),
    "autotuning": None,
    "checkpoint": ("tag_validation", "load_universal", "use_node_local_storage", "parallel_write"),
    "comet": None,
    "comms_logger": None,
    "communication_data_type": None,
    "csv_monitor": None,
    "data_efficiency": ("enabled", "seed", "data_sampling", "data_routing"),
    "data_types": ("grad_accum_dtype",),
    "dataloader_drop_last": None,
    "datastates_ckpt": None,
    "disable_allgather": None,
    "disable_python_gc": None,
    "dump_state": None,
    "expert_parallel": None,
    "gradient_allreduce_op": None,
    "gradient_clipping": None,
    "gradient_predivide_factor": None,
    "hybrid_engine": None,
    "log_level": None,
    "memory_breakdown": None,
    "pipeline": None,
    "prescale_gradients": None,
    "seq_parallel_communication_data_type": None,
    "steps_per_print": None,
    "tensor_parallel": None,
    "tensorboard": None,
    "timers": None,
    "use_data_before_expert_parallelism": None,
    "vocabulary_size": None,
    "wall_clock_breakdown": None,
    "wandb": None,
    "weight_quantization": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
}
"""What DeepSpeed takes: block -> its keys; None where DeepSpeed itself checks them."""


@dataclasses.dataclass(kw_only=True)
class DeepSpeedConfig:
    """What of DeepSpeed's configuration latentray does not derive itself."""

    zero_stage: int = 1
    """0, 1 (optimizer state shared out), 2 (gradients too) or 3 (parameters too)."""
    offload_optimizer: str = "none"
    """none, cpu or nvme (stages 1 to 3): the optimizer's state, the fp32 weights and their average."""
    offload_parameters: str = "none"
    """none, cpu or nvme (stage 3)."""
    nvme_path: str | None = None
    """Where something is on NVMe: a folder on each worker's own disk."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Merged over the derived DeepSpeed configuration; any block DeepSpeed takes that does not contradict ours."""

    def __post_init__(self) -> None:
        if self.zero_stage not in STAGES:
            raise ConfigError(
                f"There is no ZeRO stage {self.zero_stage}.", where="deepspeed.zero_stage", mend="Use 0 to 3."
            )
        self._check_offload()
        _require_known("", self.extra)
        zero = self.extra.get("zero_optimization", {})
        _require_equal("zero_optimization.stage", zero.get("stage"), self.zero_stage, "deepspeed.zero_stage")
        for block, setting in (("offload_optimizer", "offload_optimizer"), ("offload_param", "offload_parameters")):
            held = zero.get(block) or {}
            where = f"zero_optimization.{block}"
            ours = getattr(self, setting)
            given_to = "cpu" if (setting, ours) == ("offload_optimizer", "nvme") else ours  # see training/engine.py
            _require_equal(f"{where}.device", held.get("device"), given_to, f"deepspeed.{setting}={ours}")
            _require_equal(f"{where}.nvme_path", held.get("nvme_path"), self.nvme_path, "deepspeed.nvme_path")
        for key, setting in _OLD_OFFLOADS.items():
            if key in zero:
                raise ConfigError(
                    f"{key} is the older name of a setting.",
                    where=f"deepspeed.extra.zero_optimization.{key}",
                    mend=f"Set deepspeed.{setting}=cpu instead.",
                )

    def _check_offload(self) -> None:
        for key in ("offload_optimizer", "offload_parameters"):
            if getattr(self, key) not in DEVICES:
                raise ConfigError(f"{key} takes none, cpu or nvme.", where=f"deepspeed.{key}", mend="Correct it.")
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.nvme_path is not None):
            raise ConfigError(
                "What is on NVMe needs a folder there, and a folder is for nothing else.",
                where="deepspeed.nvme_path",
                mend="Set deepspeed.offload_optimizer=nvme or deepspeed.offload_parameters=nvme together with "
                "deepspeed.nvme_path=/a/folder, or none of them.",
            )

    def require_agreement(self, *, clip: float, precision: str) -> None:
        """Raise ConfigError where a block of `extra`, or an offload, contradicts the run's other settings."""
        for key, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
            if getattr(self, key) != "none" and self.zero_stage < least:
                raise ConfigError(
                    f"ZeRO stage {self.zero_stage} shares nothing out that could be offloaded.",
                    where=f"deepspeed.{key}",
                    mend=f"Set deepspeed.zero_stage={least} or more, or deepspeed.{key}=none.",
                )
        bf16, autocast = self.extra.get("bf16", {}), self.extra.get("torch_autocast", {})
        _require_equal("gradient_clipping", self.extra.get("gradient_clipping"), clip, "optimizer.clip")
        _require_equal("bf16.enabled", bf16.get("enabled"), precision == "bf16", "precision")
        _require_equal("torch_autocast.enabled", autocast.get("enabled"), precision == "autocast", "precision")
        _require_equal("torch_autocast.dtype", autocast.get("dtype"), "bfloat16", "precision")
        for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
            _require_equal(f"bf16.{key}", bf16.get(key), False, "precision")


_OLD_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_parameters"}


def _require_known(path: str, given: Mapping[str, Any]) -> None:
    known = BLOCKS.get(path) if path else tuple(name for name in BLOCKS if "." not in name)
    if known is None:
        return
    for key, value in given.items():
        where = f"{path}.{key}".lstrip(".")
        if not path and key in DERIVED:
            raise ConfigError(
                f"{key} is derived by latentray.", where=f"deepspeed.extra.{key}", mend=f"Set {DERIVED[key]} instead."
            )
        if not path and key in REMOVED:
            raise ConfigError(
                f"DeepSpeed no longer has {key}.", where=f"deepspeed.extra.{key}", mend="Remove the block."
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"DeepSpeed knows no {where}.",
                where=f"deepspeed.extra.{where}",
                mend=f"Did you mean {near[0]}?" if near else "Remove it.",
            )
        kind = KINDS.get(path, {}).get(key)
        if kind is not None and value is not None and type(value) is not kind:
            raise ConfigError(f"{where} is {value!r}.", where=f"deepspeed.extra.{where}", mend=f"Give {_WANTED[kind]}.")
        if where in BLOCKS and BLOCKS[where] is not None and value is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{where} is a block, not {value!r}.",
                    where=f"deepspeed.extra.{where}",
                    mend=f"Give its keys: {', '.join((BLOCKS[where] or ())[:4])}, ...",
                )
            _require_known(where, value)


def _require_equal(path: str, given: Any, ours: Any, setting: str) -> None:
    if given is not None and given != ours:
        raise ConfigError(
            f"{path} is {given!r} in DeepSpeed's configuration, but {setting} makes it {ours!r}.",
            where=f"deepspeed.extra.{path}",
            mend=f"Remove it there and set {setting}.",
        )
