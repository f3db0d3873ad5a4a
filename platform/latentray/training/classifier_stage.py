"""A classifier of noisy latents, which guides denoisers (Dhariwal & Nichol 2021, section 4).

It learns from what stage 2 learns from, noised as there: only network, loss and result are others. The cross-entropy of all
noise levels counts alike, whatever the objective's weighting.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from latentray.diffusion import timesteps
from latentray.diffusion.schedules import AnySchedule
from latentray.tracking import names
from latentray.training import classifier_export, export
from latentray.training.ema import EMA
from latentray.training.latent_supply import LatentSpace
from latentray.training.stage2 import DiffusionStage, MicroBatch


class ClassifierStage(DiffusionStage):
    """What the loop needs of a classifier's training; the classifier's folder at the end."""

    network = "classifier"

    def step(self, micro: MicroBatch, samples: int) -> dict[str, Tensor]:
        """Forward, backward and step on one micro-batch; metrics are of it, detached."""
        batch, device = micro.latents, self.worker.device
        assert batch.given.labels_B is not None, "refused before the run"
        labels, weight = batch.given.labels_B.to(device), batch.weight_B.to(device)
        _, noised = self.noised(micro, samples)
        logits = self.engine(noised.x_BChw.to(self.engine.dtype), noised.t_B).float()
        loss = (weight * F.cross_entropy(logits, labels, reduction="none")).mean()
        self.engine.backward(loss)
        self.engine.step()
        hit = weight * (logits.detach().argmax(dim=1) == labels)
        return {names.TRAIN_LOSS: loss.detach(), **accuracies(self.schedule, noised.t_B, hit, weight)}

    def finish(self, ema: EMA) -> export.Exported | None:
        """The folder of the averaged weights; on rank 0 only, but every rank calls it."""
        state = ema.full_state()
        if not self.worker.leads:
            return None
        assert isinstance(self.space, LatentSpace), "episodes have no classes: refused by the configuration"
        return classifier_export.classifier(
            self.worker, state, self.space, self.feed, inputs=self.inputs, facts=self.facts
        )


def accuracies(schedule: AnySchedule, t_B: Tensor, hit_B: Tensor, weight_B: Tensor) -> dict[str, Tensor]:
    """Over all noise levels and each third of them: how many classes were found, and of how many samples, (2,) each."""
    both_B2 = torch.stack([hit_B, weight_B], dim=1).float()
    third_B = timesteps.third(schedule, t_B)
    found = {names.CLASSIFIER_ACCURACY: both_B2.sum(0)}
    for number, name in enumerate(timesteps.THIRDS):
        found[names.accuracy_at(name)] = both_B2[third_B == number].sum(0)
    return found
