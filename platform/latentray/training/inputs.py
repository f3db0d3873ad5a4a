"""What a run learns from: its data sets and the autoencoder behind them, opened and checked before a worker starts."""

from __future__ import annotations

from latentray import build
from latentray.checkpoint import store
from latentray.config.train import Train
from latentray.data import latents
from latentray.diffusion import samplers, schedules
from latentray.errors import ConfigError, InputMissing
from latentray.training import feed


def check(config: Train, world: int) -> dict[str, str]:
    """The digests of a run's inputs. Raises ConfigError, InputMissing, DigestMismatch or FingerprintMismatch for what
    `world` workers could not train on."""
    config.require_divisible(world)
    return _pictures(config) if config.stage.name == "autoencoder" else _latents(config)


def _pictures(config: Train) -> dict[str, str]:
    if not config.data and not config.mixture.of:
        raise ConfigError("Stage 1 needs pictures.", where="data", mend="Add data=<what build_shards wrote>.")
    opened = _verified(config)
    weights = config.stage.lpips.weights
    if weights is not None and not store.local_path(weights).is_file():
        raise InputMissing(
            "The LPIPS backbone's weights are not there.",
            where="stage.lpips.weights",
            mend=f"Check the path {weights}.",
        )
    return opened.inputs


def _latents(config: Train) -> dict[str, str]:
    if not config.latents and not config.mixture.of:
        raise ConfigError(
            "Stage 2 needs latents.", where="latents", mend="Add latents=<what precompute_latents wrote>."
        )
    opened = _verified(config)
    described = [latents.describe(one.uri, one.manifest) for one in opened.sets]
    first = described[0]
    artifact = build.autoencoder_artifact(store.absolute(config.autoencoder_from or first.autoencoder_uri))
    for one in described:
        one.require_autoencoder(artifact)
        one.require_like(first)
    samplers.table(
        config.stage.sampler,
        schedules.build(config.objective),
        config.objective.prediction,
        config.stage.sampling_steps,
    )  # refuses what the model could not be sampled with by default
    net = config.denoiser
    for key, have, want in (
        ("denoiser.in_channels", net.in_channels, first.channels),
        ("denoiser.out_channels", net.out_channels, first.channels),
        ("denoiser.context_width", net.context_width, first.text_width),
    ):
        if have != want:
            raise ConfigError(f"{key} is {have}, but the latents have {want}.", where=key, mend=f"Set {key}={want}.")
    return opened.inputs | {"autoencoder": artifact.digest}


def _verified(config: Train) -> feed.Feed:
    """The run's data sets, opened and checked; with damage.policy=skip, damage is found and counted on the way."""
    opened = feed.Feed.open(config)
    if not opened.skip_damaged:
        for one in opened.sets:
            one.verify()
    return opened
