"""Tensors that lie in files on a node's own disk, mapped into memory: the kernel keeps of them what there is room for.

ZeRO-Infinity (Rajbhandari et al. 2021) moves the optimizer's state to NVMe by reads and writes between pinned buffers, at
stage 3 alone, and what lies on the disk is out of everyone else's reach. A mapped file is a tensor like any other: the
average, checkpoints and a resume at another world size work on it unchanged, at every stage that shares the state out.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from latentray.errors import EnvironmentRefused

LEAST_BYTES = 1 << 20
"""A smaller tensor stays in memory: each file is a mapping of its own, and a process may have some 65,000."""


class Disk:
    """A folder on a disk that tensors are put on. Its files have no name, so they go with the process, however it ends."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of a tensor's shape and type. Raises EnvironmentRefused where the disk has no room for them."""
        if _is_small(tensor):
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        try:
            handle, name = tempfile.mkstemp(dir=self.folder, prefix="latentray-")
            try:
                # Room is taken now: a mapping that outgrows its disk ends the process by SIGBUS, without a word.
                os.posix_fallocate(handle, 0, tensor.nbytes)
                flat = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            raise EnvironmentRefused(
                f"The disk cannot hold {tensor.nbytes / 1e9:.3g} GB of the optimizer's state: {error.strerror}.",
                where=f"deepspeed.nvme_path: {self.folder}",
                mend="Name a folder on a larger disk of the node's own, or take more workers.",
            ) from None
        return flat.view(tensor.shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor of any device, on the disk."""
        return self.zeros_like(tensor).copy_(tensor.detach())

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on a disk already, or too small to be."""
        return _is_small(tensor) or tensor.untyped_storage().filename is not None


def _is_small(tensor: Tensor) -> bool:
    return tensor.nbytes < max(LEAST_BYTES, 1)
