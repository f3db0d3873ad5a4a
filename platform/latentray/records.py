"""The records that travel between the parts, version 1, and the legend of shape suffixes.

Shape suffixes: B batch, T frames or steps of an episode, C channels, H/W pixel rows/columns, h/w latent rows/columns,
L tokens, D width of a token, A dimensions of an action, N captions of one sample. `x_BChw` is a batch of latents.

Members of a WebDataset sample (its `<key>` is unique in its data set):
    picture   `.jpg|.png|.webp`, `.txt` (caption), `.json` (`captions`, `width`, `height`, `label`: its class, any metadata),
              `.cls` (its class again, as other tools write it)
    latent    `.latent.safetensors` with `mean`, `logvar` float (C,h,w) or, of a clip, (T,C,h,w),
              `text.<encoder>.tokens` (N,L,D), `.mask` (N,L), `.pooled` (N,D), the same of the picture as
              `image.<encoder>...` without the N; `.json` with `captions`, source key and
              digest, `original_size`, `crop_top_left`, `target_size`, `flip`, `label`, of a clip also `frames`, `fps`, `begin`
    clip      `.mp4`, or `.frames.safetensors` with `frames` uint8 (T,H,W,3); `.json` with `fps` and `captions`
    episode   `.episode.safetensors` with `actions` float32 (T,A) and `obs.<name>` (T,...); `.json`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RECORD_VERSION = 1
PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
LATENT_MEMBER = "latent.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleId:
    """Where a sample stands: the key of every random draw made for it."""

    epoch: int
    dataset: int
    """Number of the data set in the run's mixture; 0 where there is one."""
    index: int
    """Position of the sample in its data set's canonical order (shards by name, then offset)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damaged:
    """One sample that could not be used."""

    reason: str
    """What it is counted under: `digest`, `decode`, or the reason of a rejected picture."""
    shard: str
    key: str
    what: str


@dataclasses.dataclass
class Traffic:
    """What reading remote shards cost."""

    fetched_bytes: int = 0
    """Bytes that came over the network."""
    cached_bytes: int = 0
    """Bytes that were there already."""
    retries: int = 0
    stalled_s: float = 0.0
    """Seconds that a reader waited because its read-ahead had not come yet."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(kw_only=True)
class TextEmbedding:
    """Embedded captions, or pictures, of a batch: what the denoiser's cross-attention reads."""

    tokens_BLD: torch.Tensor
    """Of a tokenizer alone int32 (B,L,1): token numbers."""
    mask_BL: torch.Tensor
    """True at real tokens, False at padding."""
    pooled_BD: torch.Tensor

    def to(self, *args, **kwargs) -> TextEmbedding:
        """Move all, cast the floating ones: the arguments of `torch.Tensor.to`."""
        return TextEmbedding(
            tokens_BLD=_moved(self.tokens_BLD, args, kwargs),
            mask_BL=self.mask_BL.to(self.tokens_BLD.device if not args else _device_of(args, self.mask_BL)),
            pooled_BD=self.pooled_BD.to(*args, **kwargs),
        )

    @classmethod
    def joined(cls, parts: Sequence[TextEmbedding]) -> TextEmbedding:
        """The rows of all, one after the other."""
        import torch

        return cls(
            tokens_BLD=torch.cat([one.tokens_BLD for one in parts]),
            mask_BL=torch.cat([one.mask_BL for one in parts]),
            pooled_BD=torch.cat([one.pooled_BD for one in parts]),
        )

    def rows(self, index) -> TextEmbedding:
        """The rows an index or slice selects."""
        return TextEmbedding(
            tokens_BLD=self.tokens_BLD[index], mask_BL=self.mask_BL[index], pooled_BD=self.pooled_BD[index]
        )


@dataclasses.dataclass(kw_only=True)
class Conditions:
    """What a denoiser is told of a batch of samples beside their noise level; empty or None where it is not told."""

    texts: tuple[TextEmbedding, ...] = ()
    """One by each encoder, in the run's order, not yet combined."""
    size_B6: torch.Tensor | None = None
    """Original size, crop and target size, (height, width) and (y, x) pixels: SDXL's."""
    labels_B: torch.Tensor | None = None
    """int64 class labels; the number of classes is the null class."""
    beside_BChw: torch.Tensor | None = None
    """Channels set beside the noisy latent: mask and masked latent (inpainting), a small picture (super-resolution)."""
    observations_BTD: torch.Tensor | None = None
    """What a policy saw: T steps, D wide, normalised."""

    def to(self, *args, **kwargs) -> Conditions:
        """Move all, cast the floating ones: the arguments of `torch.Tensor.to`."""
        return self._each(
            lambda t: _moved(t, args, kwargs),
            lambda one: one.to(*args, **kwargs),
        )

    def rows(self, index) -> Conditions:
        """The rows an index or slice selects."""
        return self._each(lambda t: t[index], lambda one: one.rows(index))

    def _each(
        self, of_tensor: Callable[[torch.Tensor], torch.Tensor], of_text: Callable[[TextEmbedding], TextEmbedding]
    ) -> Conditions:
        tensors = {name: getattr(self, name) for name in ("size_B6", "labels_B", "beside_BChw", "observations_BTD")}
        return Conditions(
            texts=tuple(of_text(one) for one in self.texts),
            **{name: None if value is None else of_tensor(value) for name, value in tensors.items()},
        )


def _moved(value: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
    """Whole numbers are not cast: they tell things apart."""
    return value.to(*args, **kwargs) if value.is_floating_point() else value.to(_device_of(args, value))


def _device_of(args: tuple, mask: torch.Tensor) -> torch.device | str:
    import torch

    named = [a for a in args if isinstance(a, str | torch.device)]
    return named[0] if named else mask.device


@dataclasses.dataclass(kw_only=True)
class Batch:
    """What every batch says of its samples, whatever they are."""

    ids: list[SampleId]
    weight_B: torch.Tensor
    """1, or 0 for a sample that keeps its place only: it counts in the loss's divisor and nowhere else."""
    damaged: list[Damaged] = dataclasses.field(default_factory=list)
    traffic: Traffic = dataclasses.field(default_factory=Traffic)


@dataclasses.dataclass(kw_only=True)
class PictureBatch(Batch):
    """Pictures for stage 1: x in [-1, 1]."""

    x_BCHW: torch.Tensor
    size_B6: torch.Tensor
    """Original size, crop and target size of each, (height, width) and (y, x): SDXL's conditioning."""
    captions: list[str]
    views: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """By vision encoder: what it sees of each picture, uint8 (B, height, width, 3)."""


@dataclasses.dataclass(kw_only=True)
class LatentBatch(Batch):
    """What stage 2 learns from, not yet shifted and scaled: latents of pictures, of clips (B,T,C,h,w), or actions (B,T,A)."""

    mean_BChw: torch.Tensor
    logvar_BChw: torch.Tensor | None
    """None where there is nothing to draw."""
    given: Conditions
    counts_B: torch.Tensor | None = None
    """Which of its numbers the loss counts, 1 or 0, in a shape that broadcasts to theirs; None counts all."""


@dataclasses.dataclass(kw_only=True)
class ClipBatch(Batch):
    """Clips for the video family: x in [-1, 1], all frames of a clip cut and mirrored alike."""

    x_BTCHW: torch.Tensor
    captions: list[str]


@dataclasses.dataclass(kw_only=True)
class EpisodeBatch(Batch):
    """Windows of episodes for the policy family: what was seen up to a step, and what was done from it on.

    An id's `index` is a position in the data set's windows.
    """

    actions_BTA: torch.Tensor
    """float32, T the horizon of prediction; after an episode's end, its last action."""
    action_mask_BT: torch.Tensor
    """False where made up."""
    observations: dict[str, torch.Tensor]
    """Name -> (B, T, ...) float32, T the horizon of observation; pictures (B, T, 3, H, W) in [-1, 1]."""
    observation_mask_BT: torch.Tensor
    """False where made up: before an episode's begin stands its first observation."""
