"""Requests -> latents -> pixels, for evaluation, the shell and the endpoint alike."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentray import build, randomness
from latentray.conditioning.denoiser_inputs import conditions, size_of
from latentray.diffusion import guidance, samplers, schedules
from latentray.diffusion.executor import Slots, Table
from latentray.diffusion.schedules import RectifiedFlow
from latentray.errors import ConfigError
from latentray.inference import editing, model_folder
from latentray.inference.model_folder import Model, SamplingDefaults
from latentray.inference.requests import SampledPicture, SamplingRequest
from latentray.randomness import Purpose
from latentray.records import TextEmbedding

__all__ = ["SampledPicture", "SamplingRequest", "TextToImage"]


class TextToImage:
    """A model ready to sample, from text alone or from a picture and a mask besides.

    The same request gives the same picture whatever else is in the batch, up to the rounding of another batch size: the
    initial latent and every fresh noise are keyed by the request's seed.
    """

    def __init__(self, model: Model, *, device: str = "auto", dtype: torch.dtype | None = None) -> None:
        self.device = build.device(device)
        self.dtype = dtype or _fast_dtype(self.device)
        self.model = model
        self.schedule = schedules.build(model.objective)
        # Convolutions in bf16 are fastest with channels last, on GPUs and on CPUs with bf16 matrix units.
        layout = torch.channels_last if self.dtype == torch.bfloat16 else torch.contiguous_format
        self.denoiser = model.denoiser.to(self.device, self.dtype, memory_format=layout)
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

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser was made for inpainting: latent, mask and masked picture as 2 C + 1 channels."""
        return self.denoiser.config.in_channels == 2 * self.autoencoder.config.latent_channels + 1

    @torch.inference_mode()
    def sample(self, requests: Sequence[SamplingRequest]) -> list[SampledPicture]:
        """Draw a batch. Samplers, steps, guidance, seeds and edits may differ; height and width must be the same.

        Raises ConfigError for mixed sizes, a size the autoencoder cannot divide, or a sampler that does not fit.
        """
        pixels = editing.keep_outside(self.decode(self.latents(requests)), requests)
        return [
            SampledPicture(
                pixels_HWC=p,
                truncated=self.model.text_encoder.is_truncated(r.prompt),
                warnings=self._warnings(r),
            )
            for p, r in zip(pixels, requests, strict=True)
        ]

    def check(self, request: SamplingRequest) -> None:
        """Raises ConfigError, as `sample` would, without drawing."""
        self._latent_shape([request])
        self._table(request, None, None)

    @torch.inference_mode()
    def latents(
        self,
        requests: Sequence[SamplingRequest],
        *,
        start: int | None = None,
        stop: int | None = None,
        begin_with: Tensor | None = None,
    ) -> Tensor:
        """Normalised latents of a batch of requests, (B,C,h,w) float32.

        Args:
            start, stop: run only these intervals of each request's steps: one model of several (see `refinement`).
            begin_with: the noisy latents another model stopped at; wanted with `start`.
        """
        shape = self._latent_shape(requests)
        edits = editing.encode_all(self, requests)
        tables = [self._table(r, start, stop) for r in requests]
        seeds = [r.seed for r in requests]
        noise = randomness.normal(randomness.keys_from_seeds(seeds, Purpose.INITIAL_LATENT), shape).to(self.device)
        begin = noise if begin_with is None else begin_with.to(noise)
        slots = Slots(len(requests), shape, dtype=torch.float32, device=self.device)
        for i, (table, edit) in enumerate(zip(tables, edits, strict=True)):
            slots.admit(i, table, begin[i] if begin_with is not None else edit.begin(table, noise[i]))
        scales = [self._scales(r, table) for r, table in zip(requests, tables, strict=True)]
        guided = _Guided(self, requests, edits)

        def fresh_noise(rows: Sequence[int], row: int) -> Tensor:
            # Counted from the first interval of the whole sampling: a refiner does not draw the base's noise again.
            keys = randomness.keys_from_seeds(
                [seeds[i] for i in rows], Purpose.SAMPLER_NOISE, counter=(start or 0) + row
            )
            return randomness.normal(keys, shape)

        while active := slots.unfinished():
            now = [scales[i][slots.row(i)] for i in active]
            slots.advance(active, functools.partial(guided, scales=now), fresh_noise)
            for i in active:
                if edits[i].mask_hw is not None:
                    edits[i].restore(slots.x[i], noise[i], *self._level(tables[i], slots.row(i)))
        return slots.x

    def _table(self, request: SamplingRequest, start: int | None, stop: int | None) -> Table:
        schedule = self.schedule
        if request.resolution_shift and isinstance(schedule, RectifiedFlow):
            shift = schedules.shift_for(
                request.height * request.width, trained_at=self.size * self.size, shift=schedule.shift
            )
            schedule = dataclasses.replace(schedule, shift=shift)
        if start is None:
            start = samplers.start_of(request.strength, request.steps)
        return samplers.table(
            request.sampler,
            schedule,
            self.model.objective.prediction,
            request.steps,
            spacing_name=request.spacing,
            start=start,
            stop=stop,
            bound=request.bound,
            quantile=request.quantile,
            eta=request.eta,
            order=request.order,
        )

    def _scales(self, request: SamplingRequest, table: Table) -> list[float]:
        """The guidance scale of each row: outside its interval it is 1, and costs no second network pass."""
        alpha, sigma = self.schedule.alpha_sigma(table.t)
        wanted = torch.full_like(alpha, request.guidance_scale)
        low, high = (torch.full_like(alpha, end) for end in request.guidance_interval)
        return guidance.within(wanted, sigma / alpha, low, high).tolist()

    def _level(self, table: Table, row: int) -> tuple[float, float]:
        """(alpha, sigma) of a request's latent before its next row; clean after the last."""
        if row == len(table):
            return 1.0, 0.0
        alpha, sigma = self.schedule.alpha_sigma(table.t[row])
        return float(alpha), float(sigma)

    @torch.inference_mode()
    def decode(self, z_BChw: Tensor) -> np.ndarray:
        """Normalised latents -> pictures, uint8 (B,H,W,3)."""
        x = self.autoencoder.decode(self.model.scale.restore(z_BChw).to(self.dtype)).float()
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def encode(self, pixels_HWC: np.ndarray) -> Tensor:
        """A picture, uint8 (H,W,3) -> its normalised latent (C,h,w) float32: the posterior's mean."""
        x = torch.tensor(pixels_HWC).permute(2, 0, 1)[None].to(self.device, self.dtype)
        return self.model.scale.normalise(self.autoencoder.encode(x / 127.5 - 1).mean_BChw.float())[0]

    def _warnings(self, request: SamplingRequest) -> tuple[str, ...]:
        small, large = min(request.height, request.width), max(request.height, request.width)
        if small == large == self.size:
            return ()
        what = f"{request.width}x{request.height} is not the trained {self.size}x{self.size}: "
        effect = "objects may repeat" if large > self.size else "pictures may be cut off or coarse"
        remedy = "; resolution_shift=true may help" if isinstance(self.schedule, RectifiedFlow) else ""
        return (what + effect + remedy + ".",)

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

    def embed(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embeddings of the prompts, each distinct one encoded once and kept for the next request."""
        missing = sorted({p for p in prompts if p not in self._embeddings})
        if missing:
            embedded = self.model.text_encoder.embed(missing)
            for i, prompt in enumerate(missing):
                self._embeddings[prompt] = embedded.rows(slice(i, i + 1))
        kept = [self._embeddings[p] for p in prompts]
        while len(self._embeddings) > 4096:
            self._embeddings.popitem(last=False)
        return TextEmbedding(
            tokens_BLD=torch.cat([one.tokens_BLD for one in kept]),
            mask_BL=torch.cat([one.mask_BL for one in kept]),
            pooled_BD=torch.cat([one.pooled_BD for one in kept]),
        ).to(self.device, self.dtype)

    def denoise(self, x: Tensor, t: Tensor, text: TextEmbedding, size_B6: Tensor) -> Tensor:
        """The network's output for noisy latents and embedded prompts of pictures of these sizes."""
        told = conditions(self.denoiser.config, text, size_B6.to(x))
        return self.denoiser(x, t, text.tokens_BLD, **told)


class _Guided:
    """The denoiser with each request's text, mask channels and guidance; both passes of guidance in one batched call."""

    def __init__(self, model: TextToImage, requests: Sequence[SamplingRequest], edits: Sequence[editing.Edit]) -> None:
        self.model = model
        self.positive = model.embed([r.prompt for r in requests])
        self.negative = model.embed([r.negative_prompt for r in requests])
        sizes = [size_of(r.height, r.width) for r in requests]
        self.sizes = torch.tensor(sizes, dtype=torch.float32, device=model.device)
        self.rescale = torch.tensor([r.guidance_rescale for r in requests], device=model.device)
        self.rescales = any(r.guidance_rescale for r in requests)
        self.channels = torch.stack([e.channels() for e in edits]).to(model.dtype) if model.takes_mask else None

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor, *, scales: Sequence[float]) -> Tensor:
        x = x.to(self.model.dtype)
        if self.channels is not None:
            x = torch.cat([x, self.channels[rows]], dim=1)
        positive, sizes = self.positive.rows(rows), self.sizes[rows]
        if all(scale == 1 for scale in scales):
            return self.model.denoise(x, t, positive, sizes)
        text = self.negative.rows(rows).beside(positive)
        both = self.model.denoise(torch.cat([x, x]), torch.cat([t, t]), text, torch.cat([sizes, sizes]))
        without, with_text = both.float().chunk(2)
        guided = guidance.classifier_free(without, with_text, torch.tensor(scales).to(x.device, non_blocking=True))
        return guidance.rescale(guided, with_text, self.rescale[rows]) if self.rescales else guided


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs and on CPUs with bf16 matrix units, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
