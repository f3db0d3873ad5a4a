"""Pictures -> token embeddings, by a transformers vision model that is frozen: CLIP's, with its projection.

Loaded from a local folder, an artifact or a hub id. Only safetensors and JSON are read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from latentray.checkpoint import store
from latentray.conditioning import text
from latentray.conditioning.text import Reading
from latentray.errors import ArtifactError
from latentray.models import torchvision_ops
from latentray.records import TextEmbedding

KINDS = ("clip_vision",)
SETTINGS = "preprocessor_config.json"
FILES = ("config.json", "model.safetensors", SETTINGS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a vision model is shown a picture: what its `preprocessor_config.json` says."""

    shorter: int
    """Pixels that the shorter side is resized to."""
    height: int
    """Of the cut in the middle."""
    width: int
    resample: int = 3
    """Pillow's number of a filter: 3 is bicubic."""
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, where: str = "") -> Preprocessing:
        """Raises ArtifactError for settings that are not of this kind."""
        try:
            size, crop = settings["size"], settings.get("crop_size", settings["size"])
            shorter = size if isinstance(size, int) else size.get("shortest_edge") or min(size["height"], size["width"])
            height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            normalises = settings.get("do_normalize", True)
            return cls(
                shorter=shorter,
                height=height,
                width=width,
                resample=int(settings.get("resample", 3)),
                scale=settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0,
                mean=tuple(settings["image_mean"]) if normalises else (0.0, 0.0, 0.0),
                std=tuple(settings["image_std"]) if normalises else (1.0, 1.0, 1.0),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"The vision encoder does not say how it is shown pictures: {error!r}.",
                where=where,
                mend=f"Give one with a {SETTINGS} as CLIP's: size, crop_size, image_mean, image_std.",
            ) from None

    def view(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """A picture, uint8 (H,W,3) of any size -> what the model sees of it, uint8 (height, width, 3)."""
        height, width = pixels_HWC.shape[:2]
        if height < width:
            rows, columns = self.shorter, int(self.shorter * width / height)
        else:
            rows, columns = int(self.shorter * height / width), self.shorter
        resized = np.asarray(
            Image.fromarray(pixels_HWC).resize((columns, rows), resample=Image.Resampling(self.resample))
        )
        top, left = (rows - self.height) // 2, (columns - self.width) // 2
        if top < 0 or left < 0:
            padded = np.zeros((max(rows, self.height), max(columns, self.width), 3), np.uint8)
            above, beside = max(-top, 0), max(-left, 0)
            padded[above : above + rows, beside : beside + columns] = resized
            resized, top, left = padded, max(top, 0), max(left, 0)
        return np.ascontiguousarray(resized[top : top + self.height, left : left + self.width])

    def normalised(self, views_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 views (B, height, width, 3) -> what the network reads, float32 (B, 3, height, width)."""
        x = views_BHWC.permute(0, 3, 1, 2).float() * self.scale
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


@dataclasses.dataclass(kw_only=True)
class ImageEncoder:
    """A frozen vision model: an encoder of a run beside its text encoders, but it reads the sample's picture."""

    model: nn.Module
    name: str
    reading: Reading
    preprocessing: Preprocessing
    fingerprint: str
    """sha256 over weights, architecture, preprocessing and reading: part of the key of every latent store."""
    digest: str
    """Of its manifest where it is an artifact, else its fingerprint: what lineage records."""
    folder: Path

    @property
    def width(self) -> int:
        """Of a token's embedding."""
        return int(self.model.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """One for each patch, and the class token before them."""
        config = self.model.config
        return (int(config.image_size) // int(config.patch_size)) ** 2 + 1

    @torch.no_grad()
    def embed(self, views_BHWC: torch.Tensor) -> TextEmbedding:
        """uint8 views (B, height, width, 3) -> tokens (B,L,D), mask (B,L) of True, projected class token (B,P).

        float32 on the CPU.
        """
        inner = self.reading.layer > 1
        x = self.preprocessing.normalised(views_BHWC.to(self.model.device)).to(self.model.dtype)
        out = self.model(pixel_values=x, output_hidden_states=inner)
        tokens = out.hidden_states[-self.reading.layer] if inner else out.last_hidden_state
        return TextEmbedding(
            tokens_BLD=tokens.float().cpu(),
            mask_BL=torch.ones(tokens.shape[:2], dtype=torch.bool),
            pooled_BD=out.image_embeds.float().cpu(),
        )

    def nothing(self) -> TextEmbedding:
        """What stands where no picture is given: zeros, a row."""
        return TextEmbedding(
            tokens_BLD=torch.zeros(1, self.max_tokens, self.width),
            mask_BL=torch.ones(1, self.max_tokens, dtype=torch.bool),
            pooled_BD=torch.zeros(1, int(self.model.config.projection_dim)),
        )

    def files(self) -> list[str]:
        """What it is read from, in its folder."""
        return files_of(self.folder, str(self.folder))


def load(source: str, *, name: str, reading: Reading, device: torch.device | str = "cpu") -> ImageEncoder:
    """A vision encoder from a local folder, an artifact's URI or a hub id. Raises as `text.load` does."""
    folder = text.local_folder(source)
    files_of(folder, source)
    torchvision_ops.ensure_importable()
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    _require_kind(folder, reading, source)
    preprocessing = Preprocessing.of(json.loads((folder / SETTINGS).read_text()), where=source)
    with text.offline():
        model = transformers.CLIPVisionModelWithProjection.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=reading.dtype
        )
    if preprocessing.height != model.config.image_size or preprocessing.width != model.config.image_size:
        raise ArtifactError(
            f"The vision encoder reads {model.config.image_size} pixels square, and is shown "
            f"{preprocessing.width}x{preprocessing.height}.",
            where=source,
            mend=f"Correct crop_size in its {SETTINGS}.",
        )
    fingerprint = store.digest_of(_decides(folder, reading))
    return ImageEncoder(
        model=model.eval().requires_grad_(False).to(device),
        name=name,
        reading=reading,
        preprocessing=preprocessing,
        fingerprint=fingerprint,
        digest=text.digest_at(source) or fingerprint,
        folder=folder,
    )


def files_of(folder: Path, where: str) -> list[str]:
    """The files an encoder is read from. Raises ArtifactError where one is missing."""
    return text.require_files(
        folder, where, FILES, what="vision encoder", mend="safetensors weights and its preprocessor"
    )


def _decides(folder: Path, reading: Reading) -> dict[str, Any]:
    digests: dict[str, Any] = {name: store.sha256_of(folder / name) for name in files_of(folder, str(folder))}
    return digests | {"reading": reading.decides()}


def _require_kind(folder: Path, reading: Reading, where: str) -> None:
    described = json.loads((folder / FILES[0]).read_text())
    inner = described.get("vision_config", described)
    if described.get("model_type") not in ("clip", "clip_vision_model"):
        raise ArtifactError(
            f"The encoder is a {described.get('model_type')}, and a {reading.kind} is asked for.",
            where=where,
            mend="Set text_encoder.kind to what it is.",
        )
    layers = inner.get("num_hidden_layers")
    if layers is not None and reading.layer > layers:
        raise ArtifactError(
            f"The vision encoder has {layers} layers, and the {reading.layer}th from the last is asked for.",
            where=where,
            mend="Lower text_encoder.layer.",
        )


def views_of(pixels: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 views of several pictures as one tensor (B, height, width, 3)."""
    return torch.from_numpy(np.stack(list(pixels)))
