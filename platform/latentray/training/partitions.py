"""The state of an engine as stretches of parameters: how checkpoints hold it, whatever the world size and ZeRO stage.

ZeRO cuts a network's fp32 weights, their moments and their average into one part per rank, each stage in its own way. A
file of a checkpoint says of each stretch which parameter it is of and where it begins; so a reader in another world, or of
another stage, picks what it needs from the files of all ranks, without a conversion and without a collective.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from latentray.errors import ArtifactError, WeightsMismatch

WEIGHT, EMA = "weight", "ema"
CODEBOOK = "codebook"
"""What a VQ autoencoder's codebook is kept under, whole."""
"""Names of the fp32 weights and of their average; the optimizer's states have its own names (`exp_avg`, ...)."""

_WHOLE = "whole"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragment:
    """A stretch of one flattened parameter, and where it lies in this rank's partitions."""

    name: str
    """The parameter's."""
    shape: tuple[int, ...]
    """The whole parameter's."""
    start: int
    """Of its first element in the flattened parameter."""
    numel: int
    partition: int
    offset: int
    """Of its first element in the partition."""

    def part(self, index: int, parts: int) -> Fragment:
        """The `index`-th of so many nearly equal parts: for ranks that all hold the whole."""
        first, last = self.numel * index // parts, self.numel * (index + 1) // parts
        return dataclasses.replace(self, start=self.start + first, numel=last - first, offset=self.offset + first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank writes of one engine: copies on the CPU."""

    fragments: tuple[Fragment, ...]
    tensors: dict[str, Tensor]
    """`<state>/<parameter>`: the stretch that this rank holds."""
    scalars: dict[str, float]
    """What is the same for all parameters: the optimizer's step count."""
    whole: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """`<state>/<parameter>`: what is not cut like the parameter, such as factored moments."""


def take(
    fragments: Iterable[Fragment],
    partitions: Mapping[str, Sequence[Tensor | None]],
    scalars: Mapping[str, float],
    whole: Mapping[str, Tensor] | None = None,
    *,
    copy: Callable[[Tensor], Tensor] = torch.clone,
) -> Snapshot:
    """Copy stretches of partitions; `partitions` by the state's name, each a list that `Fragment.partition` indexes (None
    where there is no such state), and what is taken `whole`; `copy` says where a stretch that is on the CPU already goes.
    """
    kept = tuple(one for one in fragments if one.numel)
    tensors = {
        f"{state}/{one.name}": _copied(flat.detach().reshape(-1)[one.offset : one.offset + one.numel], copy)
        for state, flats in partitions.items()
        for one in kept
        if (flat := flats[one.partition]) is not None
    }
    copied = {key: _copied(value.detach(), copy) for key, value in (whole or {}).items()}
    return Snapshot(fragments=kept, tensors=tensors, scalars=dict(scalars), whole=copied)


def _copied(value: Tensor, copy: Callable[[Tensor], Tensor]) -> Tensor:
    return copy(value) if value.device.type == "cpu" else value.cpu()


def write(path: Path, snapshot: Snapshot) -> None:
    listed = [[one.name, list(one.shape), one.start, one.numel] for one in snapshot.fragments]
    about = {"fragments": json.dumps(listed), "scalars": json.dumps(snapshot.scalars)}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {f"{_WHOLE}/{key}": value for key, value in snapshot.whole.items()}
    safetensors.torch.save_file(snapshot.tensors | whole, path, metadata=about)


class Pieces:
    """The files that the ranks of some world wrote of one engine, read as whole parameters or any stretch of them.

    Raises ArtifactError where a file cannot be read or the stretches leave a gap.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where = str(paths[0].parent) if paths else ""
        self.scalars: dict[str, float] = {}
        self.states: tuple[str, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        self._held: set[str] = set()
        self._whole: dict[str, Any] = {}
        for path in paths:
            self._open(path)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def _open(self, path: Path) -> None:
        try:
            file = safetensors.safe_open(path, framework="pt")
            about = file.metadata()
            listed, scalars = json.loads(about["fragments"]), json.loads(about["scalars"])
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"The part of a checkpoint cannot be read: {error}", where=str(path), mend="Remove this checkpoint."
            ) from None
        self.scalars |= scalars
        keys = set(file.keys())
        whole = {key for key in keys if key.startswith(f"{_WHOLE}/")}
        self._whole |= dict.fromkeys(whole, file)
        self._held |= keys - whole
        self.states = tuple(sorted(set(self.states) | {key.split("/", 1)[0] for key in keys - whole}))
        for name, shape, start, numel in listed:
            self.shapes[name] = tuple(shape)
            self._pieces.setdefault(name, []).append((start, numel, file))

    def has(self, state: str, name: str) -> bool:
        """Whether a parameter has this state, cut like itself."""
        return f"{state}/{name}" in self._held

    def whole(self, state: str, name: str) -> Tensor | None:
        """A parameter's state that is not cut like it, such as a factored moment; None where it has none."""
        key = f"{_WHOLE}/{state}/{name}"
        return self._whole[key].get_tensor(key) if key in self._whole else None

    def stretch(self, state: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter's `state`, from as many files as hold some of them."""
        pieces = self._pieces.get(name, []) if self.has(state, name) else []
        parts, at = [], start
        first = max(bisect.bisect_right(pieces, at, key=lambda piece: piece[0]) - 1, 0)
        for begin, length, file in pieces[first:]:
            if at >= start + numel:
                break
            if begin <= at < begin + length:
                last = min(begin + length, start + numel)
                parts.append(file.get_slice(f"{state}/{name}")[at - begin : last - begin])
                at = last
        if at < start + numel:
            raise ArtifactError(
                f"The checkpoint lacks elements from {at} on of {state} of {name!r}.",
                where=self.where,
                mend="Remove this checkpoint; the one before is used then.",
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def full(self, state: str) -> dict[str, Tensor]:
        """Whole parameters: the state dict of the weights, of their average, or of a moment (of those that have one)."""
        found = {}
        for name, shape in self.shapes.items():
            if not self.has(state, name):
                continue
            numel = int(torch.Size(shape).numel())
            found[name] = self.stretch(state, name, 0, numel).reshape(shape)
        return found


def restore(pieces: Pieces, state: str, fragments: Sequence[Fragment], partitions: Sequence[Tensor]) -> None:
    """Fill a rank's partitions of one state; what no parameter covers, the padding, becomes 0."""
    by_partition = _by_partition(fragments)
    for number, partition in enumerate(partitions):
        straight = partition.is_contiguous()
        flat = partition.detach().view(-1) if straight else torch.zeros(partition.numel(), dtype=partition.dtype)
        flat.zero_()
        for one in by_partition.get(number, ()):
            flat[one.offset : one.offset + one.numel] = pieces.stretch(state, one.name, one.start, one.numel)
        if not straight:
            partition.data.copy_(flat.reshape(partition.shape))


def clear_padding(fragments: Sequence[Fragment], partitions: Sequence[Tensor]) -> None:
    """Set to 0 what no parameter covers.

    DeepSpeed's stage 3 leaves there whatever was in memory: where that is no number, neither is the norm of the whole.
    """
    by_partition = _by_partition(fragments)
    for number, partition in enumerate(partitions):
        flat, at = partition.detach().view(-1), 0
        for one in sorted(by_partition.get(number, ()), key=lambda fragment: fragment.offset):
            flat[at : one.offset].zero_()
            at = one.offset + one.numel
        flat[at:].zero_()


def _by_partition(fragments: Sequence[Fragment]) -> dict[int, list[Fragment]]:
    found: dict[int, list[Fragment]] = {}
    for one in fragments:
        if one.numel:
            found.setdefault(one.partition, []).append(one)
    return found


def require_same(pieces: Pieces, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsMismatch unless the files hold these very parameters; it names the first that differs."""
    wrong = [name for name in {**shapes, **pieces.shapes} if shapes.get(name) != pieces.shapes.get(name)]
    if wrong:
        raise WeightsMismatch(
            f"The checkpoint is of another network: {wrong[0]!r} is {pieces.shapes.get(wrong[0], 'missing')} there, "
            f"{shapes.get(wrong[0], 'missing')} here; {len(wrong) - 1} more differ.",
            where=pieces.where,
            mend="Use the configuration that the run began with.",
        )
