"""Requests -> latents -> pixels, for evaluation, the shell and the endpoint alike."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentray import build, randomness
from latentray.diffusion import guidance, samplers, schedules
from latentray.errors import ConfigError
from latentray.inference import model_folder
from latentray.inference.model_folder import Model, SamplingDefaults
from latentray.randomness import Purpose
from latentray.records import TextEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """One picture to draw. `height` and `width` are in pixels, multiples of the model's downsampling."""

    prompt: str
    negative_prompt: str = ""
    steps: int
    guidance_scale: float
    seed: int
    sampler: str
    height: int
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledPicture:
    """A drawn picture, uint8 RGB (H,W,3); `truncated` where the prompt was longer than the tokenizer takes."""

    pixels_HWC: np.ndarray
    truncated: bool


class TextToImage:
    """A model ready to sample.

    The same request gives the same picture whatever else is in the batch, up to the rounding of another batch size: the
    initial latent and every fresh noise are keyed by the request's seed.
    """

    def __init__(self, model: Model, *, device: str = "auto", dtype: torch.dtype | None = None) -> None:
        self.device = build.device(device)
        self.dtype = dtype or _fast_dtype(self.device)
        self.model = model
        self.schedule = schedules.build(model.objective)
        self.denoiser = model.denoiser.to(self.device, self.dtype)
        self.autoencoder = model.autoencoder.to(self.device, self.dtype)
        model.text_encoder.model.to(self.device)
        self._embeddings: collections.OrderedDict[str, TextEmbedding] = collections.OrderedDict()

    @classmethod
    def load(cls, uri: str, *, device: str = "auto") -> TextToImage:
        """Load a model or release folder, verified by its manifest."""
        return cls(model_folder.load(uri), device=device)

    @property
    def defaults(self) -> SamplingDefaults:
        return self.model.defaults

    @property
    def size(self) -> int:
        """Native height and width in pixels."""
        return self.model.size

    @property
    def downsampling(self) -> int:
        return self.autoencoder.config.downsampling

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers that fit this model's schedule."""
        return samplers.names(self.schedule)

    @property
    def max_steps(self) -> int:
        return self.schedule.timesteps

    @torch.inference_mode()
    def sample(self, requests: Sequence[SamplingRequest]) -> list[SampledPicture]:
        """Draw a batch. Samplers, steps, guidance and seeds may differ; height and width must be the same.

        Raises ConfigError for mixed sizes, a size the autoencoder cannot divide, or a sampler that does not fit.
        """
        pixels = self.decode(self.latents(requests))
        cut = [self.model.text_encoder.is_truncated(r.prompt) for r in requests]
        return [SampledPicture(pixels_HWC=p, truncated=t) for p, t in zip(pixels, cut, strict=True)]

    @torch.inference_mode()
    def latents(self, requests: Sequence[SamplingRequest]) -> Tensor:
        """Normalised latents of a batch of requests, (B,C,h,w) float32."""
        shape = self._latent_shape(requests)
        tables = [samplers.table(r.sampler, self.schedule, self.model.objective.prediction, r.steps) for r in requests]
        seeds = [r.seed for r in requests]
        noise = randomness.normal(randomness.keys_from_seeds(seeds, Purpose.INITIAL_LATENT), shape).to(self.device)
        positive = self.embed([r.prompt for r in requests])
        negative = self.embed([r.negative_prompt for r in requests])
        scale = torch.tensor([r.guidance_scale for r in requests], device=self.device)

        def network(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            x = x.to(self.dtype)
            if bool((scale[rows] == 1).all()):
                return self.denoiser(x, t, positive[rows])
            both = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), torch.cat([negative[rows], positive[rows]]))
            without, with_text = both.float().chunk(2)
            return guidance.classifier_free(without, with_text, scale[rows])

        def fresh_noise(rows: Sequence[int], row: int) -> Tensor:
            keys = randomness.keys_from_seeds([seeds[i] for i in rows], Purpose.SAMPLER_NOISE, counter=row)
            return randomness.normal(keys, shape)

        return samplers.execute(tables, noise, network, fresh_noise)

    @torch.inference_mode()
    def decode(self, z_BChw: Tensor) -> np.ndarray:
        """Normalised latents -> pictures, uint8 (B,H,W,3)."""
        x = self.autoencoder.decode(self.model.scale.restore(z_BChw).to(self.dtype)).float()
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def _latent_shape(self, requests: Sequence[SamplingRequest]) -> tuple[int, int, int]:
        sizes = {(r.height, r.width) for r in requests}
        if len(sizes) != 1:
            raise ConfigError("Requests of one batch must have one size.", where="size", mend="Group them by size.")
        height, width = sizes.pop()
        f = self.downsampling
        if height % f or width % f or min(height, width) < f:
            raise ConfigError(
                f"{width}x{height} does not divide by {f}.", where="size", mend=f"Choose multiples of {f}."
            )
        return self.autoencoder.config.latent_channels, height // f, width // f

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Token embeddings (B,L,D), each distinct prompt encoded once and kept for the next request."""
        missing = sorted({p for p in prompts if p not in self._embeddings})
        if missing:
            embedded = self.model.text_encoder.embed(missing)
            for i, prompt in enumerate(missing):
                self._embeddings[prompt] = embedded.rows(slice(i, i + 1))
        tokens = torch.cat([self._embeddings[p].tokens_BLD for p in prompts])
        while len(self._embeddings) > 4096:
            self._embeddings.popitem(last=False)
        return tokens.to(self.device, self.dtype)


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs and on CPUs with bf16 matrix units, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
