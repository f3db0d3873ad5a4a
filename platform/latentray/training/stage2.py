"""Stage 2: the denoiser, trained on latents and embedded captions (Rombach et al. 2022, equation 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from latentray import build, randomness
from latentray.conditioning.denoiser_inputs import conditions
from latentray.diffusion import losses, schedules, timesteps
from latentray.models.autoencoder import Posterior
from latentray.randomness import Purpose, mix
from latentray.records import LatentBatch, PictureBatch, TextEmbedding
from latentray.tracking import names
from latentray.training import export, latent_supply, model_export
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.state import Worker


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

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        self.worker, self.stage, self.objective = worker, config.stage, config.objective
        self.source = latent_supply.open_source(config, worker.device)
        self.space, self.feed = self.source.space, self.source.feed
        self.inputs, self.facts = self.source.inputs, self.space.facts
        self.schedule = schedules.build(config.objective)
        net = build.seeded(lambda: build.denoiser(config.denoiser), config.seed)
        self.engine = Engine(net, config, world=worker.world, device=worker.device)
        self.engines = {"denoiser": self.engine}
        self.empty = self.space.empty.to(worker.device, torch.float32)

    def batches(self, first_step: int, last_step: int) -> Iterator[LatentBatch] | Iterator[PictureBatch]:
        worker = self.worker
        return self.source.batches(
            self.feed.source(rank=worker.rank, world=worker.world, first_step=first_step, last_step=last_step)
        )

    def micro_batches(self, batch: LatentBatch | PictureBatch, size: int) -> Iterator[MicroBatch]:
        """Cut this rank's slice of a global batch; pictures are encoded first, all of them."""
        latents = self.source.latents(batch)
        share = len(latents.ids)
        first = self.worker.rank * share
        for i in range(0, share, size):
            part = slice(i, i + size)
            yield MicroBatch(
                latents=LatentBatch(
                    mean_BChw=latents.mean_BChw[part],
                    logvar_BChw=latents.logvar_BChw[part],
                    text=latents.text.rows(part),
                    ids=latents.ids[part],
                    weight_B=latents.weight_B[part],
                    size_B6=None if latents.size_B6 is None else latents.size_B6[part],
                ),
                slots=range(first + i, first + i + size),
                of=share * self.worker.world,
            )

    def step(self, micro: MicroBatch, samples: int) -> dict[str, Tensor]:
        """Forward, backward and step on one micro-batch; metrics are means over it, detached."""
        seed, device, batch = self.worker.config.seed, self.worker.device, micro.latents

        def keys(purpose: Purpose) -> Tensor:
            return randomness.keys_of(seed, purpose, batch.ids, device=device)

        latent = batch.mean_BChw.to(device)
        if self.stage.latent == "draw":
            noise = randomness.normal(keys(Purpose.POSTERIOR), latent.shape[1:])
            latent = Posterior(mean_BChw=latent, logvar_BChw=batch.logvar_BChw.to(device)).draw(noise)
        x0 = self.space.scale.normalise(latent)
        u = self._spread(randomness.uniform(keys(Purpose.TIMESTEP)), micro, samples)
        t = timesteps.from_uniform(self.objective, self.schedule, u)
        noise = randomness.normal(keys(Purpose.NOISE), x0.shape[1:])
        if self.objective.offset_noise:
            offset = randomness.normal(keys(Purpose.OFFSET_NOISE), x0.shape[1:2])
            noise = losses.offset_noise(noise, offset, self.objective.offset_noise)
        noised = losses.noised(self.objective, self.schedule, x0, noise, t)
        dropped = randomness.uniform(keys(Purpose.CAPTION_DROPOUT)) < self.stage.caption_dropout
        context = torch.where(dropped[:, None, None], self.empty.tokens_BLD, batch.text.tokens_BLD.to(device))
        pooled = torch.where(dropped[:, None], self.empty.pooled_BD, batch.text.pooled_BD.to(device))
        given = TextEmbedding(tokens_BLD=context, mask_BL=batch.text.mask_BL, pooled_BD=pooled)
        dtype = self.engine.dtype
        more = conditions(self.worker.config.denoiser, given, batch.size_B6)
        told = {name: value.to(device, dtype) for name, value in more.items()}
        y = self.engine(noised.x_BChw.to(dtype), noised.t_B, context.to(dtype), **told)
        loss = (batch.weight_B.to(device) * losses.mean_squared(y, noised)).mean()
        self.engine.backward(loss)
        self.engine.step()
        return {names.TRAIN_LOSS: loss.detach()}

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
        return model_export.model(self.worker, state, self.space, self.feed, inputs=self.inputs, facts=self.facts)
