"""Stage 2: the denoiser, trained on latents and conditions (Rombach et al. 2022, equation 3).

One class for every family: pictures, clips and actions differ in where they come from (`latent_supply`) and in the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from latentray import build, randomness
from latentray.conditioning import denoiser_inputs
from latentray.diffusion import losses, schedules, timesteps, variance
from latentray.models.autoencoder import Posterior
from latentray.randomness import Purpose, mix
from latentray.records import Conditions, EpisodeBatch, LatentBatch, PictureBatch
from latentray.tracking import names
from latentray.training import denoiser_weights, export, latent_supply, model_export, policy_export
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.state import Worker

_EXPORTS: dict[str, Callable[..., export.Exported]] = {"policy": policy_export.model}
"""Families whose model is no text-to-image pipeline."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """What a worker takes at once, and its place in the global batch: with buckets these differ in size."""

    latents: LatentBatch
    slots: range
    """Positions of its samples in the global batch."""
    of: int
    """Samples in the global batch."""


class DiffusionStage:
    """What the loop needs of stage 2: the engine, batches, one step, and the model folder at the end."""

    network = "denoiser"
    """What checkpoints call the network that is trained."""

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        self.worker, self.stage, self.objective = worker, config.stage, config.objective
        self.source = latent_supply.open_source(config, worker.device)
        self.space, self.feed = self.source.space, self.source.feed
        self.initial = denoiser_weights.find(config)
        self.inputs, self.facts = self.source.inputs | denoiser_weights.lineage(self.initial), self.space.facts
        self.schedule = schedules.build(config.objective)
        net = build.seeded(lambda: build.denoiser(config.denoiser), config.seed)
        if self.initial is not None:
            self.initial.fill(net)
        self.engine = Engine(net, config, world=worker.world, device=worker.device)
        self.engines = {self.network: self.engine}
        self.empty = self.space.empty.to(worker.device, torch.float32)

    def batches(
        self, first_step: int, last_step: int
    ) -> Iterator[LatentBatch] | Iterator[PictureBatch] | Iterator[EpisodeBatch]:
        worker = self.worker
        return self.source.batches(
            self.feed.source(rank=worker.rank, world=worker.world, first_step=first_step, last_step=last_step)
        )

    def micro_batches(self, batch: LatentBatch | PictureBatch | EpisodeBatch, size: int) -> Iterator[MicroBatch]:
        """Cut this rank's slice of a global batch; pictures are encoded first, all of them."""
        latents = self.source.latents(batch)
        share = len(latents.ids)
        first = self.worker.rank * share
        for i in range(0, share, size):
            part = slice(i, i + size)
            yield MicroBatch(
                latents=LatentBatch(
                    mean_BChw=latents.mean_BChw[part],
                    logvar_BChw=None if latents.logvar_BChw is None else latents.logvar_BChw[part],
                    given=latents.given.rows(part),
                    ids=latents.ids[part],
                    weight_B=latents.weight_B[part],
                    counts_B=None if latents.counts_B is None else latents.counts_B[part],
                ),
                slots=range(first + i, first + i + size),
                of=share * self.worker.world,
            )

    def step(self, micro: MicroBatch, samples: int) -> dict[str, Tensor]:
        """Forward, backward and step on one micro-batch; metrics are means over it, detached."""
        batch, device = micro.latents, self.worker.device
        x0, noised = self.noised(micro, samples)
        given = self._dropped(batch.given.to(device, torch.float32), self._keys(batch))
        told = denoiser_inputs.told(self.worker.config.denoiser, given).to(self.engine.dtype)
        y, v = variance.split(self.objective, told.call(self.engine, noised.x_BChw.to(self.engine.dtype), noised.t_B))
        counts = None if batch.counts_B is None else batch.counts_B.to(device)
        error_B = losses.mean_squared(y, noised, counts)
        if v is not None:
            error_B = variance.hybrid(self.objective, self.schedule, error_B, y, v, x0, noised)
        loss = (batch.weight_B.to(device) * error_B).mean()
        self.engine.backward(loss)
        self.engine.step()
        return {names.TRAIN_LOSS: loss.detach()}

    def noised(self, micro: MicroBatch, samples: int) -> tuple[Tensor, losses.Noised]:
        """The clean latents of a micro-batch, normalised, and what becomes of them at the noise levels that are drawn."""
        batch, keys = micro.latents, self._keys(micro.latents)
        latent = batch.mean_BChw.to(self.worker.device)
        if self.stage.latent == "draw" and batch.logvar_BChw is not None:
            noise = randomness.normal(keys(Purpose.POSTERIOR), latent.shape[1:])
            latent = Posterior(mean_BChw=latent, logvar_BChw=batch.logvar_BChw.to(latent.device)).draw(noise)
        x0 = self.space.scale.normalise(latent)
        u = self._spread(randomness.uniform(keys(Purpose.TIMESTEP)), micro, samples)
        t = timesteps.from_uniform(self.objective, self.schedule, u)
        noise = randomness.normal(keys(Purpose.NOISE), x0.shape[1:])
        if self.objective.offset_noise:
            offset = randomness.normal(keys(Purpose.OFFSET_NOISE), x0.shape[-3:-2])
            noise = losses.offset_noise(noise, offset, self.objective.offset_noise)
        return x0, losses.noised(self.objective, self.schedule, x0, noise, t)

    def _keys(self, batch: LatentBatch) -> Callable[[Purpose], Tensor]:
        """What each sample's draws are keyed by."""
        seed, device = self.worker.config.seed, self.worker.device
        return lambda purpose: randomness.keys_of(seed, purpose, batch.ids, device=device)

    def _dropped(self, given: Conditions, keys: Callable[[Purpose], Tensor]) -> Conditions:
        """Conditions with some samples' captions and labels left out, for classifier-free guidance."""
        together = randomness.uniform(keys(Purpose.CAPTION_DROPOUT)) < self.stage.caption_dropout
        draws = randomness.uniform(keys(Purpose.ENCODER_DROPOUT), (max(len(given.texts), 1),))
        alone = (draws < self.stage.encoder_dropout).unbind(1)[: len(given.texts)]
        return denoiser_inputs.dropped(given, self.empty, together, alone)

    def _spread(self, u_B: Tensor, micro: MicroBatch, samples: int) -> Tensor:
        """The timestep draws of a micro-batch, spread over the global batch that begins at `samples`."""
        slots = torch.arange(micro.slots.start, micro.slots.stop)
        config = self.worker.config
        shift = mix(config.seed, Purpose.TIMESTEP_SHIFT, samples // config.global_batch_size) * 2.0**-64
        return timesteps.spread_over_batch(self.objective, u_B, slots, shift, micro.of)

    def finish(self, ema: EMA) -> export.Exported | None:
        """The model folder of the averaged weights; on rank 0 only, but every rank calls it."""
        state = ema.full_state()
        if not self.worker.leads:
            return None
        if self.initial is not None:
            state = self.initial.beside(state)
        make = _EXPORTS.get(self.worker.config.denoiser.family, model_export.model)
        return make(self.worker, state, self.space, self.feed, inputs=self.inputs, facts=self.facts)
