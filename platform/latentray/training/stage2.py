"""Stage 2: the denoiser, trained on stored latents and embedded captions (Rombach et al. 2022, equation 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from latentray import build, randomness
from latentray.data import latents
from latentray.data.latent_batches import latent_batches
from latentray.diffusion import losses, schedules, timesteps
from latentray.models.autoencoder import Posterior
from latentray.models.unet import UNet
from latentray.randomness import Purpose, mix
from latentray.records import LatentBatch
from latentray.tracking import names
from latentray.training import export
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.feed import Feed
from latentray.training.state import Worker


class DiffusionStage:
    """What the loop needs of stage 2: the engine, batches, one step, and the model folder at the end."""

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        self.worker, self.stage, self.objective = worker, config.stage, config.objective
        self.feed = Feed.open(config)
        self.inputs = self.feed.inputs
        first = self.feed.sets[0]
        self.store = latents.describe(first.uri, first.manifest)
        self.schedule = schedules.build(config.objective)
        net = build.seeded(lambda: UNet(config.denoiser), config.seed)
        self.engine = Engine(net, config, world=worker.world, device=worker.device)
        self.engines = {"denoiser": self.engine}
        self.empty = self.store.empty_prompt().to(worker.device, torch.float32)

    @property
    def facts(self) -> dict[str, object]:
        return {"autoencoder": self.store.autoencoder_fingerprint, "text_encoder": self.store.text_fingerprint}

    def batches(self, first_step: int, last_step: int) -> Iterator[LatentBatch]:
        worker = self.worker
        return latent_batches(
            self.feed.source(rank=worker.rank, world=worker.world, first_step=first_step, last_step=last_step),
            encoder=self.store.encoder,
            workers=worker.config.loader_workers,
        )

    def micro_batches(self, batch: LatentBatch, size: int) -> Iterator[LatentBatch]:
        first = self.worker.config.global_batch_size * self.worker.rank // self.worker.world
        for i in range(0, len(batch.ids), size):
            part = slice(i, i + size)
            yield LatentBatch(
                first_slot=first + i,
                mean_BChw=batch.mean_BChw[part],
                logvar_BChw=batch.logvar_BChw[part],
                text=batch.text.rows(part),
                ids=batch.ids[part],
                weight_B=batch.weight_B[part],
                size_B6=None if batch.size_B6 is None else batch.size_B6[part],
            )

    def step(self, batch: LatentBatch, samples: int) -> dict[str, Tensor]:
        """Forward, backward and step on one micro-batch; metrics are means over it, detached."""
        seed, device = self.worker.config.seed, self.worker.device

        def keys(purpose: Purpose) -> Tensor:
            return randomness.keys_of(seed, purpose, batch.ids, device=device)

        latent = batch.mean_BChw.to(device)
        if self.stage.latent == "draw":
            noise = randomness.normal(keys(Purpose.POSTERIOR), latent.shape[1:])
            latent = Posterior(mean_BChw=latent, logvar_BChw=batch.logvar_BChw.to(device)).draw(noise)
        x0 = self.store.scale.normalise(latent)
        u = self._spread(randomness.uniform(keys(Purpose.TIMESTEP)), batch, samples)
        t = timesteps.from_uniform(self.objective, self.schedule, u)
        noise = randomness.normal(keys(Purpose.NOISE), x0.shape[1:])
        if self.objective.offset_noise:
            offset = randomness.normal(keys(Purpose.OFFSET_NOISE), x0.shape[1:2])
            noise = losses.offset_noise(noise, offset, self.objective.offset_noise)
        noised = losses.noised(self.objective, self.schedule, x0, noise, t)
        dropped = randomness.uniform(keys(Purpose.CAPTION_DROPOUT)) < self.stage.caption_dropout
        context = torch.where(dropped[:, None, None], self.empty.tokens_BLD, batch.text.tokens_BLD.to(device))
        dtype = self.engine.dtype
        y = self.engine(noised.x_BChw.to(dtype), noised.t_B, context.to(dtype))
        loss = (batch.weight_B.to(device) * losses.mean_squared(y, noised)).mean()
        self.engine.backward(loss)
        self.engine.step()
        return {names.TRAIN_LOSS: loss.detach()}

    def _spread(self, u_B: Tensor, batch: LatentBatch, samples: int) -> Tensor:
        """The timestep draws of a micro-batch, spread over the global batch that begins at `samples`."""
        size = self.worker.config.global_batch_size
        slots = torch.arange(batch.first_slot, batch.first_slot + len(batch.ids))
        shift = mix(self.worker.config.seed, Purpose.TIMESTEP_SHIFT, samples // size) * 2.0**-64
        return timesteps.spread_over_batch(self.objective, u_B, slots, shift, size)

    def finish(self, ema: EMA) -> export.Exported | None:
        """The model folder of the averaged weights; on rank 0 only, but every rank calls it."""
        state = ema.full_state()
        return (
            export.model(self.worker, state, self.store, inputs=self.inputs, facts=self.facts)
            if self.worker.leads
            else None
        )
