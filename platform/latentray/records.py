"""The records that travel between the parts, version 1, and the legend of shape suffixes.

Shape suffixes: B batch, T frames or steps of an episode, C channels, H/W pixel rows/columns, h/w latent rows/columns,
L tokens, D width of a token, A dimensions of an action, N captions of one sample. `x_BChw` is a batch of latents.

Members of a WebDataset sample (its `<key>` is unique in its data set):
    picture   `.jpg|.png|.webp`, `.txt` (caption), `.json` (`captions`, `width`, `height`, any metadata)
    latent    `.latent.safetensors` with `mean`, `logvar` float (C,h,w) or, of a clip, (T,C,h,w),
              `text.<encoder>.tokens` (N,L,D), `.mask` (N,L), `.pooled` (N,D); `.json` with `captions`, source key and
              digest, `original_size`, `crop_top_left`, `target_size`, `flip`, of a clip also `frames`, `fps`, `begin`
    clip      `.mp4`, or `.frames.safetensors` with `frames` uint8 (T,H,W,3); `.json` with `fps` and `captions`
    episode   `.episode.safetensors` with `actions` float32 (T,A) and `obs.<name>` (T,...); `.json`
"""

from __future__ import annotations

import dataclasses
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
    """Embedded captions of a batch: what the denoiser's cross-attention reads."""

    tokens_BLD: torch.Tensor
    mask_BL: torch.Tensor
    """True at real tokens, False at padding."""
    pooled_BD: torch.Tensor

    def to(self, *args, **kwargs) -> TextEmbedding:
        """Move all, cast the floating ones: the arguments of `torch.Tensor.to`."""
        return TextEmbedding(
            tokens_BLD=self.tokens_BLD.to(*args, **kwargs),
            mask_BL=self.mask_BL.to(self.tokens_BLD.device if not args else _device_of(args, self.mask_BL)),
            pooled_BD=self.pooled_BD.to(*args, **kwargs),
        )

    def beside(self, other: TextEmbedding) -> TextEmbedding:
        """Both, one after the other."""
        import torch

        return TextEmbedding(
            tokens_BLD=torch.cat([self.tokens_BLD, other.tokens_BLD]),
            mask_BL=torch.cat([self.mask_BL, other.mask_BL]),
            pooled_BD=torch.cat([self.pooled_BD, other.pooled_BD]),
        )

    def rows(self, index) -> TextEmbedding:
        """The rows an index or slice selects."""
        return TextEmbedding(
            tokens_BLD=self.tokens_BLD[index], mask_BL=self.mask_BL[index], pooled_BD=self.pooled_BD[index]
        )


def _device_of(args: tuple, mask: torch.Tensor) -> torch.device | str:
    import torch

    named = [a for a in args if isinstance(a, str | torch.device)]
    return named[0] if named else mask.device


@dataclasses.dataclass(kw_only=True)
class PictureBatch:
    """Pictures for stage 1: x in [-1, 1]."""

    x_BCHW: torch.Tensor
    size_B6: torch.Tensor
    """Original size, crop and target size of each, (height, width) and (y, x): SDXL's conditioning."""
    captions: list[str]
    ids: list[SampleId]
    weight_B: torch.Tensor
    """1, or 0 for a sample that keeps its place only: it counts in the loss's divisor and nowhere else."""
    damaged: list[Damaged] = dataclasses.field(default_factory=list)
    traffic: Traffic = dataclasses.field(default_factory=Traffic)


@dataclasses.dataclass(kw_only=True)
class LatentBatch:
    """Latents and embedded captions for stage 2, not yet shifted and scaled."""

    mean_BChw: torch.Tensor
    logvar_BChw: torch.Tensor
    text: TextEmbedding
    ids: list[SampleId]
    weight_B: torch.Tensor
    """As a PictureBatch's."""
    size_B6: torch.Tensor | None = None
    """As a PictureBatch's; None where the latents do not say it."""
    damaged: list[Damaged] = dataclasses.field(default_factory=list)
    traffic: Traffic = dataclasses.field(default_factory=Traffic)


@dataclasses.dataclass(kw_only=True)
class ClipBatch:
    """Clips for the video family: x in [-1, 1], all frames of a clip cut and mirrored alike."""

    x_BTCHW: torch.Tensor
    captions: list[str]
    ids: list[SampleId]
    weight_B: torch.Tensor
    """As a PictureBatch's."""
    damaged: list[Damaged] = dataclasses.field(default_factory=list)
    traffic: Traffic = dataclasses.field(default_factory=Traffic)


@dataclasses.dataclass(kw_only=True)
class EpisodeBatch:
    """Windows of episodes for the policy family: what was seen up to a step, and what was done from it on."""

    actions_BTA: torch.Tensor
    """float32, T the horizon of prediction; after an episode's end, its last action."""
    action_mask_BT: torch.Tensor
    """False where made up."""
    observations: dict[str, torch.Tensor]
    """Name -> (B, T, ...) float32, T the horizon of observation; pictures (B, T, 3, H, W) in [-1, 1]."""
    observation_mask_BT: torch.Tensor
    """False where made up: before an episode's begin stands its first observation."""
    ids: list[SampleId]
    """Of windows: `index` is a position in the data set's windows."""
    weight_B: torch.Tensor
    """As a PictureBatch's."""
    damaged: list[Damaged] = dataclasses.field(default_factory=list)
    traffic: Traffic = dataclasses.field(default_factory=Traffic)
