"""Stage 1: the autoencoder, trained by reconstruction + LPIPS + an adversarial term (Rombach et al. 2022), and by what keeps
its latents in bounds: the KL term, or the commitment to a codebook (van den Oord et al. 2017, equation 3).

Two engines, one forward and one backward each per micro-batch. The adversarial term enters through its gradient in the
picture, d L_adv/d rec, times the adaptive weight: a surrogate loss with the same gradient as the sum of the terms, which
works under every ZeRO stage, and leaves the discriminator's parameters without a gradient from the autoencoder's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from latentray import build, randomness
from latentray.checkpoint import store, weights
from latentray.data.picture_batches import picture_batches
from latentray.data.transforms import Augment
from latentray.models import perceptual
from latentray.models.autoencoder import Posterior, last_layer_gradient
from latentray.models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_hinge, generator_hinge
from latentray.randomness import Purpose
from latentray.records import PictureBatch
from latentray.tracking import names
from latentray.training import export, initial_weights
from latentray.training.codebook import Codebook, CodebookEngine
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.feed import Feed
from latentray.training.state import Worker

CODEBOOK = "quantizer.codebook_KD"


class AutoencoderStage:
    """What the loop needs of stage 1: engines, batches, one step, and the artifact at the end."""

    def __init__(self, worker: Worker) -> None:
        config = worker.config
        self.worker, self.stage = worker, config.stage
        self.feed = Feed.open(config)
        self.initial = initial_weights.autoencoder(config)
        self.inputs = self.feed.inputs | ({"autoencoder": self.initial.digest} if self.initial else {})
        net: Any = build.seeded(lambda: build.autoencoder(config.autoencoder), config.seed)
        if self.initial is not None:
            weights.load_into(net, self.initial.state(), where=self.initial.uri)
        self.trains_encoder = self.stage.train_only == "all"
        net.encoder.requires_grad_(self.trains_encoder)
        last = net.decoder.conv_out.weight.shape  # ZeRO-3 empties shapes once the engine holds the network
        self.last_shape = torch.Size(last)
        self.codebook: Codebook | None = None
        self.engine: Engine
        if config.autoencoder.kind == "vq" and self.trains_encoder:
            engine = CodebookEngine(net, config, world=worker.world, device=worker.device)
            self.engine, self.codebook = engine, engine.codebook
        else:
            self.engine = Engine(net, config, world=worker.world, device=worker.device)
        self.engines = {"autoencoder": self.engine}
        self.perceptual: perceptual.Perceptual | None = None
        if self.stage.lpips.weight > 0:
            self.perceptual = perceptual.load(
                self.stage.lpips.net,
                weights=self.stage.lpips.weights,
                random_backbone=self.stage.lpips.random_backbone,
                seed=config.seed,
            ).to(worker.device)
            if worker.leads and self.perceptual.backbone.is_random:
                print(
                    f"LPIPS: the {self.stage.lpips.net} backbone is RANDOM ({self.perceptual.backbone.detail})",
                    flush=True,
                )
        self.discriminator: Engine | None = None
        if self.stage.discriminator.weight > 0:
            d = self.stage.discriminator
            critic = build.seeded(lambda: PatchDiscriminator(channels=d.channels, layers=d.layers), config.seed + 1)
            self.discriminator = Engine(critic, config, world=worker.world, device=worker.device, lr=d.lr)
            self.engines["discriminator"] = self.discriminator

    @property
    def facts(self) -> dict[str, object]:
        """What manifest and W&B record beside the configuration."""
        if self.perceptual is None:
            return {}
        backbone = self.perceptual.backbone
        return {"lpips_backbone": {"net": backbone.net, "source": backbone.source, "detail": backbone.detail}}

    def batches(self, first_step: int, last_step: int) -> Iterator[PictureBatch]:
        worker, config = self.worker, self.worker.config
        return picture_batches(
            self.feed.source(rank=worker.rank, world=worker.world, first_step=first_step, last_step=last_step),
            shapes=self.feed.shapes or [(config.size, config.size)],
            augment=Augment(crop=config.crop, flip=config.flip),
            workers=config.loader_workers,
        )

    def micro_batches(self, batch: PictureBatch, size: int) -> Iterator[PictureBatch]:
        for i in range(0, len(batch.ids), size):
            part = slice(i, i + size)
            yield PictureBatch(
                x_BCHW=batch.x_BCHW[part],
                size_B6=batch.size_B6[part],
                captions=batch.captions[part],
                ids=batch.ids[part],
                weight_B=batch.weight_B[part],
            )

    def step(self, batch: PictureBatch, samples: int) -> dict[str, Tensor]:
        """Forward, backward and step of both engines on one micro-batch; metrics are means over it, detached."""
        stage, device = self.stage, self.worker.device
        x, weight = batch.x_BCHW.to(device), batch.weight_B.to(device)
        keys = randomness.keys_of(self.worker.config.seed, Purpose.POSTERIOR, batch.ids, device=device)
        net = self.worker.config.autoencoder
        latent_shape = (net.latent_channels, x.shape[2] // net.downsampling, x.shape[3] // net.downsampling)
        noise = randomness.normal(keys, latent_shape)
        rec, latent, about, features = self.engine(x.to(self.engine.dtype), noise.to(self.engine.dtype))
        metrics: dict[str, Tensor] = {}
        loss = self._reconstruction(rec.float(), x, weight, samples, metrics)
        if self.trains_encoder and self.codebook is None:
            kl = (weight * Posterior(mean_BChw=latent, logvar_BChw=about).kl()).mean()
            loss = loss + stage.kl_weight * kl
            metrics[names.AUTOENCODER_KL] = kl
        elif self.codebook is not None:
            loss = loss + stage.codebook.commitment * self._commitment(latent, about, batch, weight, metrics)
        adversarial = self.discriminator is not None and samples >= stage.discriminator.start_samples
        if adversarial:
            loss = loss + self._adversarial(rec, x, weight, features, samples, metrics)
        self.engine.backward(loss)
        self.engine.step()
        if adversarial:
            self._critic_step(x, rec.detach(), weight, metrics)
        metrics[names.TRAIN_LOSS] = loss
        return {name: value.detach() for name, value in metrics.items()}

    def _reconstruction(
        self, rec: Tensor, x: Tensor, weight_B: Tensor, samples: int, metrics: dict[str, Tensor]
    ) -> Tensor:
        """Pixel distance and, once it has begun, LPIPS; (B,3,H,W) each -> scalar."""
        error = (rec - x).abs() if self.stage.reconstruction == "l1" else (rec - x).square()
        loss = (weight_B * error.flatten(1).mean(1)).mean()
        metrics[names.AUTOENCODER_RECONSTRUCTION] = loss
        if self.perceptual is not None and samples >= self.stage.lpips.start_samples:
            distance = (weight_B * self.perceptual(rec, x)).mean()
            metrics[names.AUTOENCODER_LPIPS] = distance
            loss = loss + self.stage.lpips.weight * distance
        return loss

    def _commitment(
        self, latent: Tensor, codes_B1hw: Tensor, batch: PictureBatch, weight_B: Tensor, metrics: dict[str, Tensor]
    ) -> Tensor:
        """Squared distance of the encoder's outputs, (B,C,h,w), from their vectors; the codebook takes note of them."""
        assert self.codebook is not None
        distance = (latent.float() - self.codebook.quantizer.lookup(codes_B1hw)).square()
        commitment = (weight_B * distance.flatten(1).mean(1)).mean()
        self.codebook.observe(latent, codes_B1hw, batch.ids, weight_B)
        metrics[names.AUTOENCODER_COMMITMENT] = commitment
        metrics[names.CODEBOOK_USAGE] = self.codebook.usage.float()
        metrics[names.CODEBOOK_PERPLEXITY] = self.codebook.perplexity.float()
        return commitment

    def _adversarial(
        self, rec: Tensor, x: Tensor, weight_B: Tensor, features: Tensor, samples: int, metrics: dict[str, Tensor]
    ) -> Tensor:
        """A surrogate whose gradient in `rec` is weight * adaptive * d L_adv/d rec."""
        assert self.discriminator is not None
        leaf = rec.detach().requires_grad_(True)
        value = generator_hinge(self.discriminator.module(leaf), weight_B)
        (grad_adversarial,) = torch.autograd.grad(value, leaf)
        leaf = rec.detach().float().requires_grad_(True)
        (grad_reconstruction,) = torch.autograd.grad(self._reconstruction(leaf, x, weight_B, samples, {}), leaf)
        patch = self.worker.config.autoencoder.patch
        at_last = [
            last_layer_gradient(g, features, patch, self.last_shape) for g in (grad_reconstruction, grad_adversarial)
        ]
        for gradient in at_last:
            dist.all_reduce(gradient)  # the norm of the mean, else the weight would depend on the world size
            gradient.div_(self.worker.world)
        weight = adaptive_weight(*at_last, limit=self.stage.discriminator.max_adaptive_weight)
        metrics[names.AUTOENCODER_ADVERSARIAL] = value
        metrics[names.AUTOENCODER_ADAPTIVE_WEIGHT] = weight
        return self.stage.discriminator.weight * weight * (rec.float() * grad_adversarial.float()).sum()

    def _critic_step(self, x: Tensor, rec: Tensor, weight_B: Tensor, metrics: dict[str, Tensor]) -> None:
        assert self.discriminator is not None
        both = self.discriminator(torch.cat([x.to(rec.dtype), rec]))  # one forward per backward
        real, fake = both.chunk(2)
        loss = discriminator_hinge(real, fake, weight_B)
        self.discriminator.backward(loss)
        self.discriminator.step()
        metrics[names.DISCRIMINATOR_LOSS] = loss
        metrics[names.DISCRIMINATOR_LOGITS_REAL] = real.float().mean()
        metrics[names.DISCRIMINATOR_LOGITS_FAKE] = fake.float().mean()

    def finish(self, ema: EMA) -> export.Exported | None:
        """The artifact of the averaged weights; on rank 0 only, but every rank calls it."""
        state = ema.full_state()
        if not self.worker.leads:
            return None
        if self.codebook is not None:
            state[CODEBOOK] = self.codebook.average_KD.cpu().clone()
        if self.initial is not None:
            state = self.initial.state() | state  # what was frozen, to the bit
        return export.autoencoder(
            self.worker,
            state,
            self.feed.sets[0],
            store.join(store.parent(self.feed.sets[0].uri), "validation"),
            perceptual=self.perceptual,
            inputs=self.inputs,
            facts=self.facts,
            encoder_of=None if self.trains_encoder else self.initial,
        )
