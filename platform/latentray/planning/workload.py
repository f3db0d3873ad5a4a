"""What one micro-batch of a run takes on one worker: networks built from its configuration, and its training step.

The step does what `training.stage1` and `training.stage2` do, on stand-ins without contents (see `meter`). Memory is
linear in the micro-batch, so two sizes are measured, and two numbers describe each quantity.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from latentray import build
from latentray.conditioning.text import PRECISIONS
from latentray.config.train import Train
from latentray.models import perceptual
from latentray.models.autoencoder import KLAutoencoder, Posterior, last_layer_gradient
from latentray.models.discriminator import PatchDiscriminator, discriminator_hinge, generator_hinge
from latentray.planning import optimizer_state
from latentray.planning.meter import Meter, default_dtype, stand_ins

BATCHES = (4, 8)
"""Micro-batches that are measured: large enough that activations, not a layer's weights, make the peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """fixed + per_sample * n."""

    fixed: float
    per_sample: float

    def at(self, samples: int) -> float:
        return self.fixed + self.per_sample * samples

    @classmethod
    def through(cls, values: Mapping[int, float]) -> Linear:
        """The line through two points, samples -> value."""
        (n, a), (m, b) = values.items()
        slope = (b - a) / (m - n)
        return cls(fixed=a - slope * n, per_sample=slope)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """One network of a run."""

    name: str
    parameters: int
    trained: bool = True
    averaged: bool = False
    """Has an exponential moving average."""
    bytes: int = 0
    """Of weights and buffers, where it is not trained."""
    optimizer_numbers: int = 0
    """What the optimizer keeps of it beside the weights, whole; 0 where it is not trained."""
    staged_numbers: int = 0
    """What it makes of the gradients and keeps until the step, at ZeRO stage 1 and 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What the step of one worker takes beside weights, gradients and optimizer."""

    networks: tuple[Network, ...]
    activations: Linear
    """Bytes that the forward pass leaves for the backward pass."""
    peak: Linear
    """Most bytes that live at a time in forward and backward pass; activations among them."""
    flops: dict[str, float]
    """Per sample, forward and backward pass, by the type of the operands: bf16, fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of stage 1 in which the same terms of the loss count."""

    share: float
    """Of the run's samples."""
    lpips: bool
    critic: bool


def phases(config: Train) -> list[Phase]:
    """The parts of a run, by which terms of stage 1's loss have begun; one part for stage 2."""
    if config.stage.name != "autoencoder":
        return [Phase(share=1.0, lpips=False, critic=False)]
    total = config.total_samples
    lpips, critic = config.stage.lpips, config.stage.discriminator
    begins = {
        "lpips": lpips.start_samples if lpips.weight > 0 else total,
        "critic": critic.start_samples if critic.weight > 0 else total,
    }
    edges = sorted({0, total, *(min(at, total) for at in begins.values())})
    return [
        Phase(share=(until - since) / total, **{name: at <= since for name, at in begins.items()})
        for since, until in itertools.pairwise(edges)
    ]


def measure(config: Train, *, gpu: bool, text_tokens: int, clip_frames: int = 1) -> Workload:
    """Build the run's networks on stand-ins and meter its step.

    Args:
        gpu: with the kernels a GPU takes; else those of this machine's CPU.
        text_tokens: of each caption.
        clip_frames: of each clip, for a video denoiser.
    """
    sizes = {"text_tokens": text_tokens, "clip_frames": clip_frames}
    found = [_measure_phase(config, phase, gpu=gpu, sizes=sizes) for phase in phases(config)]
    heaviest = max((one for _, one in found), key=lambda one: one.peak.at(BATCHES[-1]))
    flops: dict[str, float] = {}
    for share, one in found:
        for kind, count in one.flops.items():
            flops[kind] = flops.get(kind, 0.0) + share * count
    everywhere = max((one.networks for _, one in found), key=len)
    return dataclasses.replace(heaviest, networks=everywhere, flops=flops)


def _measure_phase(config: Train, phase: Phase, *, gpu: bool, sizes: Mapping[str, int]) -> tuple[float, Workload]:
    peak, activations = {}, {}
    for batch in BATCHES:
        meter, step = _run(config, phase, batch, gpu=gpu, sizes=sizes)
        peak[batch], activations[batch] = float(meter.peak), float(meter.activations)
    return phase.share, Workload(
        networks=step.networks,
        activations=Linear.through(activations),
        peak=Linear.through(peak),
        flops={kind: count / batch for kind, count in meter.flops.items()},
    )


def _run(
    config: Train, phase: Phase, batch: int, *, gpu: bool, sizes: Mapping[str, int]
) -> tuple[Meter, _AutoencoderStep | _DiffusionStep]:
    distance = _perceptual(config.stage.lpips.net, gpu=gpu) if phase.lpips else None
    with stand_ins(gpu=gpu, autocast=config.precision == "autocast"):
        step = _STEPS[config.stage.name](config, phase, distance, sizes=sizes)
        apart: list[Tensor] = []
        for net in step.modules:
            for parameter in net.parameters():
                apart.append(parameter)
                if parameter.requires_grad:  # gradients are counted by ZeRO stage: what comes is added to these
                    parameter.grad = torch.empty_like(parameter)
                    apart.append(parameter.grad)
            apart += net.buffers()
        meter = Meter(apart)
        with meter:
            step(batch, meter)
    return meter, step


def _side(config: Train) -> int:
    """Pixels of the pictures; of the largest buckets, whose batches fill the memory."""
    return max(config.buckets.sizes, default=config.size)


def _dtype(config: Train) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


class _DiffusionStep:
    """Stage 2 and classifiers: encode where that is done online, one forward and one backward pass of the network."""

    def __init__(self, config: Train, phase: Phase, distance: nn.Module | None, *, sizes: Mapping[str, int]) -> None:
        self.config, self.sizes = config, sizes
        with default_dtype(_dtype(config)):
            self.net = build.denoiser(config.denoiser)
        self.modules: list[nn.Module] = [self.net]
        name = "classifier" if config.stage.name == "classifier" else "denoiser"
        self.networks: tuple[Network, ...] = (_trained(name, self.net, config, averaged=True),)
        kept = [parameter for parameter in self.net.parameters() if not parameter.requires_grad]
        if kept:
            self.networks += (_frozen("kept layers", kept),)
        self.encoder: KLAutoencoder | None = None
        if config.online.enabled:
            self.encoder = (
                build.autoencoder(config.autoencoder)
                .eval()
                .requires_grad_(False)
                .to(PRECISIONS[config.online.precision])
            )
            self.modules.append(self.encoder)
            self.networks += (_frozen("autoencoder", self.encoder.parameters(), buffers=self.encoder.buffers()),)

    def __call__(self, batch: int, meter: Meter) -> None:
        net, dtype = self.config.denoiser, _dtype(self.config)
        if self.encoder is not None:
            self._encode(batch)
        side = _side(self.config) // self.config.autoencoder.downsampling
        shapes = {
            "video": (self.sizes["clip_frames"], net.in_channels, side, side),
            "policy": (net.action_steps, net.in_channels),
        }
        shape = shapes.get(net.family, (net.in_channels, side, side))
        x = torch.empty(batch, *shape, dtype=dtype)
        context = None
        if net.context_width is not None:
            tokens = self.sizes["text_tokens"]
            context = torch.empty(batch, tokens, net.context_width, dtype=dtype)
            if net.context_layers:  # it embeds the numbers of words itself
                context = torch.zeros(batch, tokens, 1, dtype=torch.int32)
        conditions = {
            "pooled": torch.empty(batch, net.pooled_width or 1, dtype=dtype),
            "size": torch.empty(batch, net.size_numbers),
            "labels": torch.empty(batch, dtype=torch.int64),
            "observations": torch.empty(batch, net.observation_steps, net.observation_width or 1, dtype=dtype),
        }
        given = {name: conditions[name] for name in net.reads}
        y = self.net(x, torch.empty(batch), context, **given)
        loss = (y.float() - torch.empty_like(y, dtype=torch.float32)).square().flatten(1).mean(1).mean()
        _backward(loss, meter)

    def _encode(self, batch: int) -> None:
        """In batches of the one shape that stored latents are encoded in."""
        one = self.config.online.batch_size
        assert self.encoder is not None
        side = _side(self.config)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            shape = (one, self.config.autoencoder.in_channels, side, side)
            for _ in range(-(-batch // one)):
                self.encoder.encode(torch.empty(shape, dtype=PRECISIONS[self.config.online.precision]))


class _AutoencoderStep:
    """Stage 1: the autoencoder's step with the adversarial term's surrogate, then the discriminator's."""

    def __init__(self, config: Train, phase: Phase, distance: nn.Module | None, *, sizes: Mapping[str, int]) -> None:
        self.config = config
        with default_dtype(_dtype(config)):
            self.net = build.autoencoder(config.autoencoder)
            critic = config.stage.discriminator
            self.critic = PatchDiscriminator(channels=critic.channels, layers=critic.layers) if phase.critic else None
        self.modules: list[nn.Module] = [self.net]
        self.networks: tuple[Network, ...] = (_trained("autoencoder", self.net, config, averaged=True),)
        if self.critic is not None:
            self.modules.append(self.critic)
            self.networks += (_trained("discriminator", self.critic, config),)
        self.perceptual = distance
        if distance is not None:
            self.modules.append(distance)
            self.networks += (_frozen("LPIPS", distance.parameters(), buffers=distance.buffers()),)

    def __call__(self, batch: int, meter: Meter) -> None:
        config, dtype = self.config, _dtype(self.config)
        side = _side(config)
        small = side // config.autoencoder.downsampling
        x = torch.empty(batch, config.autoencoder.in_channels, side, side)
        noise = torch.empty(batch, config.autoencoder.latent_channels, small, small, dtype=dtype)
        rec, mean, logvar, features = self.net(x.to(dtype), noise)
        loss = self._reconstruction(rec.float(), x) + Posterior(mean_BChw=mean, logvar_BChw=logvar).kl().mean()
        if self.critic is not None:
            loss = loss + self._adversarial(rec, x, features, meter)
        _backward(loss, meter)
        if self.critic is not None:
            real, fake = self.critic(torch.cat([x.to(rec.dtype), rec.detach()])).chunk(2)
            judged = discriminator_hinge(real, fake, torch.ones(batch))
            _backward(judged, meter)

    def _reconstruction(self, rec: Tensor, x: Tensor) -> Tensor:
        loss = (rec - x).abs().flatten(1).mean(1).mean()
        return loss if self.perceptual is None else loss + self.perceptual(rec, x).mean()

    def _adversarial(self, rec: Tensor, x: Tensor, features: Tensor, meter: Meter) -> Tensor:
        assert self.critic is not None
        leaf = rec.detach().requires_grad_(True)
        value = generator_hinge(self.critic(leaf), torch.ones(len(x)))
        meter.before_backward()
        (adversarial,) = torch.autograd.grad(value, leaf)
        leaf = rec.detach().float().requires_grad_(True)
        again = self._reconstruction(leaf, x)
        meter.before_backward()
        (reconstruction,) = torch.autograd.grad(again, leaf)
        shape = self.net.decoder.conv_out.weight.shape
        for gradient in (reconstruction, adversarial):
            last_layer_gradient(gradient, features, self.config.autoencoder.patch, shape)
        return (rec.float() * adversarial.float()).sum()


def _backward(loss: Tensor, meter: Meter) -> None:
    meter.before_backward()
    # `loss.backward()` takes the stand-ins' kernels away while it runs: what checkpointed blocks compute again would differ
    torch.autograd.Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


_STEPS: dict[str, type[_AutoencoderStep] | type[_DiffusionStep]] = {
    "autoencoder": _AutoencoderStep,
    "diffusion": _DiffusionStep,
    "classifier": _DiffusionStep,
}


def _trained(name: str, net: nn.Module, config: Train, *, averaged: bool = False) -> Network:
    return Network(
        name=name,
        parameters=sum(one.numel() for one in net.parameters() if one.requires_grad),
        averaged=averaged,
        optimizer_numbers=optimizer_state.numbers(config.optimizer.name, net),
        staged_numbers=optimizer_state.staged(config.optimizer.name, net),
    )


def _frozen(name: str, held: Iterable[Tensor], *, buffers: Iterable[Tensor] = ()) -> Network:
    parameters = list(held)
    return Network(
        name=name,
        parameters=sum(one.numel() for one in parameters),
        trained=False,
        bytes=sum(one.numel() * one.element_size() for one in (*parameters, *buffers)),
    )


def _perceptual(net: str, *, gpu: bool) -> nn.Module:
    """LPIPS, whatever its weights' values; built before the stand-ins, since it reads a file of its package."""
    built = perceptual.load(net, random_backbone=True)
    return built.to("meta") if gpu else built
