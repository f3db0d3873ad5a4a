"""What a sampler's step calls: the denoiser with each request's conditions and guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentray.conditioning.denoiser_inputs import NEGATIVE_AESTHETIC_SCORE, size_of
from latentray.diffusion import guidance, variance
from latentray.inference import editing
from latentray.inference.requests import SamplingRequest

if TYPE_CHECKING:
    from latentray.inference.sampling import TextToImage


class Guided:
    """The denoiser with each request's text, mask channels and guidance; both passes of guidance in one batched call."""

    def __init__(self, model: TextToImage, requests: Sequence[SamplingRequest], edits: Sequence[editing.Edit]) -> None:
        self.model = model
        self.learned: variance.LearnedNoise | None = None
        sizes = [size_of(r.height, r.width) for r in requests]
        channels = editing.channels(model, requests, edits)
        labels = None if model.classes is None else [r.label for r in requests]
        likes = [r.like_HWC for r in requests]
        self.positive = model.told(
            [r.prompt for r in requests], sizes, labels=labels, likes=likes, channels_BChw=channels
        )
        self.negative = model.told(
            [r.negative_prompt for r in requests], sizes, channels_BChw=channels, score=NEGATIVE_AESTHETIC_SCORE
        )
        self.rescale = torch.tensor([r.guidance_rescale for r in requests], device=model.device)
        self.rescales = any(r.guidance_rescale for r in requests)
        self.pulls = any(r.classifier_scale for r in requests)
        self.pull = torch.tensor([r.classifier_scale for r in requests], device=model.device)
        self.labels = torch.tensor([r.label or 0 for r in requests], device=model.device)

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor, *, scales: Sequence[float], active: Sequence[int]) -> Tensor:
        y = self._guided(x, t, rows, scales=scales, active=active)
        return self._pulled(y, x, t, rows) if self.pulls else y

    def _pulled(self, y: Tensor, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """Drawn to the classes by the classifier's gradient."""
        classify, labels = self.model.classifier, self.labels[rows].clone()
        assert classify is not None, "refused before"
        gradient = guidance.gradient_of(lambda x_t, t_B: classify(x_t, t_B, labels.clone()), x, t)
        alpha, sigma = self.model.schedule.alpha_sigma(t)
        prediction = self.model.model.objective.prediction
        return guidance.classifier(
            y.float(), gradient, self.pull[rows], prediction=prediction, alpha_B=alpha, sigma_B=sigma
        )

    def _guided(self, x: Tensor, t: Tensor, rows: Tensor, *, scales: Sequence[float], active: Sequence[int]) -> Tensor:
        x, net = x.to(self.model.dtype), self.model.denoiser
        positive = self.positive.rows(rows)
        if all(scale == 1 for scale in scales):
            return self._prediction(positive.call(net, x, t), active)
        both = self.negative.rows(rows).beside(positive).call(net, torch.cat([x, x]), torch.cat([t, t]))
        without, with_text = self._prediction(both.float(), [*[-1] * len(active), *active]).chunk(2)
        guided = guidance.classifier_free(without, with_text, torch.tensor(scales).to(x.device, non_blocking=True))
        return guidance.rescale(guided, with_text, self.rescale[rows]) if self.rescales else guided

    def _prediction(self, y: Tensor, active: Sequence[int]) -> Tensor:
        """What the sampler's rows read of an output; a learned variance is that with the conditions, and not guided."""
        y, v = variance.split(self.model.model.objective, y)
        if v is not None and self.learned is not None:
            self.learned.note(v, active)
        return y
