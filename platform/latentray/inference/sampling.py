"""Requests -> latents -> pixels, for evaluation, the shell and the endpoint alike."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentray import allocator, build, randomness
from latentray.conditioning import beside, images
from latentray.conditioning.denoiser_inputs import AESTHETIC_SCORE, Told, told, zeroed
from latentray.conditioning.encoders import CaptionEncoder, ImageEncoder
from latentray.conditioning.text import PRECISIONS
from latentray.diffusion import guidance, samplers, schedules, variance
from latentray.diffusion.executor import Slots, Table
from latentray.diffusion.schedules import RectifiedFlow
from latentray.errors import ConfigError
from latentray.inference import editing, model_folder
from latentray.inference.classifier_folder import LatentClassifier
from latentray.inference.guided import Guided
from latentray.inference.model_folder import Model, SamplingDefaults
from latentray.inference.placement import Placement
from latentray.inference.requests import SampledPicture, SamplingRequest, label_of
from latentray.models.tiling import decode_in_strips
from latentray.models.unet import UNet
from latentray.randomness import Purpose
from latentray.records import Conditions, TextEmbedding

__all__ = ["SampledPicture", "SamplingRequest", "TextToImage"]


class TextToImage:
    """A model ready to sample, from text alone or from a picture and a mask besides.

    The same request gives the same picture whatever else is in the batch, up to the rounding of another batch size: the
    initial latent and every fresh noise are keyed by the request's seed.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        offload: bool = False,
        compile: bool = False,
        text_precision: str | None = None,
    ) -> None:
        """
        Args:
            text_precision: fp32 or bf16, what text and vision encoders compute in; None is what the model learnt from.
            compile: by torch.compile, the denoiser: the first steps of a new size take minutes, all others less time. On a CPU
                each of at most three graphs then holds the weights once more, as its products take them.
            offload: keep each part on the device for its turn alone, and decode in strips (`models.tiling`): less memory, more
                time.
        """
        self.device = build.device(device)
        self.placement = Placement(self.device, offload=offload)
        self.dtype = dtype or _fast_dtype(self.device)
        self.model = model
        self.schedule = schedules.build(model.objective)
        # Convolutions in bf16 are fastest with channels last, on GPUs and on CPUs with bf16 matrix units.
        layout = torch.channels_last if self.dtype == torch.bfloat16 else torch.contiguous_format
        self.denoiser = model.denoiser.to(self.dtype, memory_format=layout)
        self.autoencoder = model.autoencoder.to(self.dtype)
        if text_precision is not None:
            for encoder in model.text_encoders:
                encoder.model.to(PRECISIONS[text_precision])
        self._compiled = compile
        if compile:
            build.require_compiler()
            self.denoiser.compile(fullgraph=True)
        self.placement.place(self.denoiser, self.autoencoder, *(one.model for one in model.text_encoders))
        self.classifier: guidance.Classifier | None = None
        """Of noisy latents, for requests with a `classifier_scale`; set by whoever has one."""
        self.guide: LatentClassifier | None = None
        """That classifier, where it is one that was trained (`guide_by`)."""
        self._embeddings: collections.OrderedDict[str, tuple[TextEmbedding, ...]] = collections.OrderedDict()

    @classmethod
    def load(
        cls,
        uri: str,
        *,
        device: str = "auto",
        offload: bool = False,
        compile: bool = False,
        text_precision: str | None = None,
    ) -> TextToImage:
        """Load a model or release folder, verified by its manifest. On a CPU this process keeps what it frees from then on."""
        if build.device(device).type == "cpu":
            allocator.keep_freed_memory()
        found = model_folder.load(uri)
        return cls(found, device=device, offload=offload, compile=compile, text_precision=text_precision)

    @property
    def defaults(self) -> SamplingDefaults:
        return self.model.defaults

    @property
    def size(self) -> int:
        """Native height and width in pixels."""
        return self.model.size

    @property
    def frames(self) -> int:
        """Of the clips it learnt from; 0 for a model of pictures."""
        return self.model.frames

    @property
    def fps(self) -> float:
        """Frames per second of its clips; 0 for a model of pictures."""
        return self.model.fps

    @property
    def takes_like(self) -> bool:
        """Whether it can be given a picture to draw variations of."""
        return any(isinstance(one, ImageEncoder) for one in self.model.text_encoders)

    @property
    def classes(self) -> int | None:
        """How many classes it draws; None for a model that knows none."""
        return self.denoiser.config.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Theirs, in their order; none where they have no names."""
        return self.model.classes

    @property
    def labels(self) -> tuple[int | None, tuple[str, ...]]:
        """How many classes a request may name, and their names: the model's own, else those of the classifier that guides it."""
        if self.classes is None and self.guide is not None:
            return self.guide.classes, self.guide.class_names
        return self.classes, self.class_names

    def name_of(self, label: int) -> str:
        """Of a class, or its number where it has no name."""
        names = self.labels[1]
        return names[label] if 0 <= label < len(names) else str(label)

    def guide_by(self, classifier: LatentClassifier) -> None:
        """Let requests be drawn to their classes by a classifier. Raises as its `require_for` for one of another model."""
        classifier.require_for(self.model)
        self.placement.place(classifier.network)
        self.classifier = self.guide = classifier

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
    def makes_larger(self) -> int:
        """The factor of a super-resolution model; 0 for others."""
        told = self.model.beside
        return told.factor if told.kind == "super_resolution" else 0

    @property
    def takes_mask(self) -> bool:
        """Whether the denoiser was made for inpainting: latent, mask and masked picture as 2 C + 1 channels."""
        return self.denoiser.config.in_channels == 2 * self.autoencoder.config.latent_channels + 1

    @torch.inference_mode()
    def sample(self, requests: Sequence[SamplingRequest]) -> list[SampledPicture]:
        """Draw a batch. Samplers, steps, guidance, seeds and edits may differ; size and frames must be the same.

        Raises ConfigError for mixed sizes, a size the autoencoder cannot divide, frames where the model draws pictures or
        none where it draws clips, or a sampler that does not fit.
        """
        pixels = editing.keep_outside(self.decode(self.latents(requests)), requests)
        return [
            SampledPicture(
                pixels_HWC=p,
                truncated=self.is_truncated(r.prompt),
                warnings=self._warnings(r),
            )
            for p, r in zip(pixels, requests, strict=True)
        ]

    def check(self, request: SamplingRequest) -> None:
        """Raises ConfigError, as `sample` would, without drawing."""
        self._require_label(request)
        self._require_like([request.like_HWC])
        self._require_classifier(request)
        self._latent_shape([request])
        editing.require_small(self, request)
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
        """Normalised latents of a batch of requests, (B,C,h,w) float32; of clips (B,T,C,h,w).

        Args:
            start, stop: run only these intervals of each request's steps: one model of several (see `refinement`).
            begin_with: the noisy latents another model stopped at; wanted with `start`.
        """
        shape = self._latent_shape(requests)
        for request in requests:
            self._require_label(request)
            self._require_classifier(request)
        edits = editing.encode_all(self, requests)
        tables = [self._table(r, start, stop) for r in requests]
        seeds = [r.seed for r in requests]
        noise = randomness.normal(randomness.keys_from_seeds(seeds, Purpose.INITIAL_LATENT), shape).to(self.device)
        begin = noise if begin_with is None else begin_with.to(noise)
        slots = Slots(len(requests), shape, dtype=torch.float32, device=self.device)
        for i, (table, edit) in enumerate(zip(tables, edits, strict=True)):
            slots.admit(i, table, begin[i] if begin_with is not None else edit.begin(table, noise[i]))
        scales = [self._scales(r, table) for r, table in zip(requests, tables, strict=True)]
        guided = Guided(self, requests, edits)
        if self.model.objective.learned_variance:
            guided.learned = variance.LearnedNoise(self.schedule, tables, [r.sampler for r in requests])

        def fresh_noise(rows: Sequence[int], row: int) -> Tensor:
            # Counted from the first interval of the whole sampling: a refiner does not draw the base's noise again.
            keys = randomness.keys_from_seeds(
                [seeds[i] for i in rows], Purpose.SAMPLER_NOISE, counter=(start or 0) + row
            )
            drawn = randomness.normal(keys, shape)
            return drawn if guided.learned is None else guided.learned.widened(drawn, rows, row)

        guides = [] if self.guide is None else [self.guide.network]
        compiling = build.tuned(self.device) if self._compiled else contextlib.nullcontext()
        with self.placement.at_work(self.denoiser, *guides), compiling:
            while active := slots.unfinished():
                now = [scales[i][slots.row(i)] for i in active]
                slots.advance(active, functools.partial(guided, scales=now, active=active), fresh_noise)
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
            spacing_name=request.spacing or self.defaults.spacing,
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
        """Normalised latents -> pictures, uint8 (B,H,W,3); those of clips, (B,T,C,h,w), -> (B,T,H,W,3)."""
        if z_BChw.ndim == 5:
            return np.stack([self.decode(z_TChw) for z_TChw in z_BChw])
        latent = self.model.scale.restore(z_BChw).to(self.dtype)
        with self.placement.at_work(self.autoencoder):
            x = (
                decode_in_strips(self.autoencoder, latent)
                if self.placement.offload
                else self.autoencoder.decode(latent)
            )
        x = x.float()
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def encode(self, pixels_HWC: np.ndarray, blank_HW: np.ndarray | None = None) -> Tensor:
        """A picture, uint8 (H,W,3) -> its normalised latent (C,h,w) float32: the posterior's mean.

        Args:
            blank_HW: True where the picture is to be blank.
        """
        x = self.pixels(pixels_HWC)
        if blank_HW is not None:
            x = beside.without(x, torch.tensor(blank_HW, device=self.device)[None, None])
        with self.placement.at_work(self.autoencoder):
            return self.model.scale.normalise(self.autoencoder.encode(x).mean_BChw.float())[0]

    def pixels(self, pixels_HWC: np.ndarray) -> Tensor:
        """A picture, uint8 (H,W,3) -> (1,3,H,W) in [-1, 1]."""
        return torch.tensor(pixels_HWC).permute(2, 0, 1)[None].to(self.device, self.dtype) / 127.5 - 1

    def _warnings(self, request: SamplingRequest) -> tuple[str, ...]:
        found = []
        if request.frames != self.frames:
            found.append(
                f"{request.frames} frames are not the trained {self.frames}: the motion may repeat or break off."
            )
        small, large = min(request.height, request.width), max(request.height, request.width)
        if small == large == self.size:
            return tuple(found)
        what = f"{request.width}x{request.height} is not the trained {self.size}x{self.size}: "
        effect = "objects may repeat" if large > self.size else "pictures may be cut off or coarse"
        remedy = "; resolution_shift=true may help" if isinstance(self.schedule, RectifiedFlow) else ""
        return (*found, what + effect + remedy + ".")

    def _latent_shape(self, requests: Sequence[SamplingRequest]) -> tuple[int, ...]:
        """(C,h,w), or (T,C,h,w) of clips."""
        sizes = {(r.height, r.width, r.frames) for r in requests}
        if len(sizes) != 1:
            raise ConfigError(
                "Requests of one batch must have one size and one number of frames.",
                where="size",
                mend="Group them by size and frames.",
            )
        height, width, frames = sizes.pop()
        if bool(frames) != bool(self.frames):
            raise ConfigError(
                "The model draws clips, and no frames were asked for."
                if self.frames
                else f"The model draws pictures, and {frames} frames were asked for.",
                where="frames",
                mend=f"Ask for frames={self.frames}, say." if self.frames else "Leave frames out.",
            )
        f = self.downsampling
        if height % f or width % f or min(height, width) < f:
            raise ConfigError(
                f"{width}x{height} does not divide by {f}.", where="size", mend=f"Choose multiples of {f}."
            )
        shape = (self.autoencoder.config.latent_channels, height // f, width // f)
        return (frames, *shape) if frames else shape

    def is_truncated(self, prompt: str) -> bool:
        """True where a text encoder cuts the prompt off."""
        return any(encoder.is_truncated(prompt) for encoder in self._readers)

    @property
    def _readers(self) -> list[CaptionEncoder]:
        """The encoders that read prompts."""
        return [one for one in self.model.text_encoders if not isinstance(one, ImageEncoder)]

    def embed(
        self, prompts: Sequence[str | None], likes: Sequence[np.ndarray | None] | None = None
    ) -> tuple[TextEmbedding, ...]:
        """Embeddings by each encoder: of prompts, each distinct one encoded once and kept for the next request, or of pictures.

        Args:
            prompts: None where none is given: as the empty one is embedded, or zeros where the model learnt so.
            likes: what vision encoders are shown, None for nothing.
        """
        read = iter(self._read(prompts))
        likes = likes or [None] * len(prompts)
        found = [
            self._seen(one, likes) if isinstance(one, ImageEncoder) else next(read) for one in self.model.text_encoders
        ]
        return tuple(one.to(self.device, self.dtype) for one in found)

    def _seen(self, encoder: ImageEncoder, likes: Sequence[np.ndarray | None]) -> TextEmbedding:
        different = {id(one): one for one in likes if one is not None}
        rows = {id(None): encoder.nothing()}
        if different:
            views = images.views_of([encoder.preprocessing.view(one) for one in different.values()])
            with self.placement.at_work(encoder.model):
                embedded = encoder.embed(views)
            rows |= {key: embedded.rows(slice(i, i + 1)) for i, key in enumerate(different)}
        return TextEmbedding.joined([rows[id(one)] for one in likes])

    def _read(self, prompts: Sequence[str | None]) -> list[TextEmbedding]:
        encoders = self._readers
        missing = sorted({p or "" for p in prompts} - self._embeddings.keys())
        if missing:
            with self.placement.at_work(*(encoder.model for encoder in encoders)):
                embedded = [encoder.embed(missing) for encoder in encoders]
            for i, prompt in enumerate(missing):
                self._embeddings[prompt] = tuple(one.rows(slice(i, i + 1)) for one in embedded)
        kept = [self._kept(p) for p in prompts]
        while len(self._embeddings) > 4096:
            self._embeddings.popitem(last=False)
        return [TextEmbedding.joined([one[i] for one in kept]) for i in range(len(encoders))]

    def _kept(self, prompt: str | None) -> tuple[TextEmbedding, ...]:
        found = self._embeddings[prompt or ""]
        return zeroed(found) if prompt is None and self.model.zero_when_empty else found

    def _require_label(self, request: SamplingRequest) -> None:
        if request.label is not None:
            label_of(request.label, self.labels[0])

    def _require_classifier(self, request: SamplingRequest) -> None:
        if not request.classifier_scale:
            return
        if self.classifier is None or request.label is None:
            raise ConfigError(
                "There is no classifier of noisy latents."
                if self.classifier is None
                else "A classifier draws to a class.",
                where="classifier_scale" if self.classifier is None else "label",
                mend="Set classifier_scale=0." if self.classifier is None else "Give its label, or classifier_scale=0.",
            )

    def _require_like(self, likes: Sequence[np.ndarray | None]) -> None:
        if any(one is not None for one in likes) and not self.takes_like:
            raise ConfigError(
                "The model has no vision encoder, and draws no variations of pictures.",
                where="like",
                mend="Leave it out; to change a picture, give it as picture with a strength.",
            )

    def told(
        self,
        prompts: Sequence[str | None],
        sizes: Sequence[Sequence[float]],
        *,
        labels: Sequence[int | None] | None = None,
        likes: Sequence[np.ndarray | None] | None = None,
        channels_BChw: Tensor | None = None,
        score: float = AESTHETIC_SCORE,
    ) -> Told:
        """What the denoiser is told of pictures to draw: worked out once, and used in every step.

        Args:
            prompts: None where none is given (see `embed`).
            sizes: the six numbers of each (`size_of`).
            labels: the class of each, None for none in particular; of models of classes alone.
            likes: pictures to draw variations of, None for none; of models with a vision encoder alone.
            channels_BChw: what is set beside the noisy latent.
            score: how beautiful, of 10; of SDXL's refiner alone.

        Raises ConfigError for a class that the model does not know, and for a picture that it cannot be given.
        """
        likes = likes or [None] * len(prompts)
        self._require_like(likes)
        classes, labelled = self.classes, None
        numbers = [classes if one is None else label_of(one, classes) for one in labels or [None] * len(prompts)]
        if classes is not None:
            labelled = torch.tensor(numbers, device=self.device)
        given = Conditions(
            texts=self.embed(prompts, likes),
            size_B6=torch.tensor(sizes, dtype=torch.float32, device=self.device),
            labels_B=labelled,
            beside_BChw=channels_BChw,
        )
        made = told(self.denoiser.config, given, score=score).to(self.dtype)
        if self.denoiser.config.context_layers:
            assert isinstance(self.denoiser, UNet), "refused by the configuration"
            with self.placement.at_work(self.denoiser), torch.inference_mode():
                return made.read_by(self.denoiser.read)
        return made


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs and on CPUs with bf16 matrix units, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
