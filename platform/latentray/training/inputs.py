"""What a run learns from: its data sets and the encoders behind them, opened and checked before a worker starts."""

from __future__ import annotations

from collections.abc import Sequence

from latentray import build
from latentray.checkpoint import store
from latentray.conditioning import text
from latentray.config.train import Train
from latentray.data import latents
from latentray.diffusion import samplers, schedules
from latentray.errors import ConfigError, InputMissing
from latentray.records import TextEmbedding
from latentray.training import feed, latent_supply
from latentray.training.feed import Shape


def check(config: Train, world: int) -> dict[str, str]:
    """The digests of a run's inputs. Raises ConfigError, InputMissing, DigestMismatch or FingerprintMismatch for what
    `world` workers could not train on."""
    config.require_divisible(world)
    if config.stage.name == "autoencoder":
        return _pictures(config)
    _require_sampler(config)
    return _online(config) if config.online.enabled else _latents(config, world)


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


def _latents(config: Train, world: int) -> dict[str, str]:
    if not config.latents and not config.mixture.of:
        raise ConfigError(
            "Stage 2 needs latents.",
            where="latents",
            mend="Add latents=<what precompute_latents wrote>, or data=<pictures> and online.enabled=true.",
        )
    opened = _verified(config)
    described = [latents.describe(one.uri, one.manifest) for one in opened.sets]
    first = described[0]
    artifact = build.autoencoder_artifact(latent_supply.autoencoder_uri(config, first.autoencoder_uri))
    for one in described:
        one.require_autoencoder(artifact)
        one.require_like(first)
        if one.frames:
            raise ConfigError(
                "These are latents of clips, and the denoiser draws pictures.",
                where=one.uri,
                mend="Give latents of pictures.",
            )
    if opened.buckets:
        fewest = config.cluster.min_workers if config.cluster.kind == "ray" else None
        for workers in range(fewest or world, world + 1):
            config.require_buckets_divisible(workers)
    told = all(set(latents.CONDITIONS) <= set(one.index.table.column_names) for one in opened.sets)
    _require_denoiser(config, artifact, first.empty_prompt(), opened.shapes, has_sizes=told)
    return opened.inputs | {"autoencoder": artifact.digest}


def _online(config: Train) -> dict[str, str]:
    if not config.data and not config.mixture.of:
        raise ConfigError("There is nothing to encode.", where="data", mend="Add data=<what build_shards wrote>.")
    if not config.autoencoder_from:
        raise ConfigError(
            "Pictures are encoded by an autoencoder.",
            where="autoencoder_from",
            mend="Add autoencoder_from=<what stage 1 made>.",
        )
    artifact = build.autoencoder_artifact(latent_supply.autoencoder_uri(config))
    encoder = text.load(config.online.text_encoder)
    opened = _verified(config)
    for height, width in opened.shapes:
        if height % artifact.config.downsampling or width % artifact.config.downsampling:
            raise ConfigError(
                f"Pictures of {width}x{height} do not divide by the autoencoder's {artifact.config.downsampling}.",
                where="buckets.step" if opened.buckets else "size",
                mend=f"Choose a multiple of {artifact.config.downsampling}.",
            )
    _require_denoiser(config, artifact, encoder.embed([""]), opened.shapes)
    return opened.inputs | {"autoencoder": artifact.digest, "text_encoder": encoder.digest}


def _require_sampler(config: Train) -> None:
    """Refuse what the model could not be sampled with by default."""
    samplers.table(
        config.stage.sampler,
        schedules.build(config.objective),
        config.objective.prediction,
        config.stage.sampling_steps,
    )


def _require_denoiser(
    config: Train,
    artifact: build.AutoencoderArtifact,
    empty: TextEmbedding,
    shapes: Sequence[Shape],
    *,
    has_sizes: bool = True,
) -> None:
    """Raise ConfigError for a denoiser that does not fit the latents, or their captions.

    Args:
        empty: the embedding of the empty caption, as wide as all are.
        shapes: (height, width) of the pictures behind the latents, pixels.
        has_sizes: whether each sample says its original size and crop.
    """
    net, channels = config.denoiser, artifact.config.latent_channels
    if net.classes is not None:
        raise ConfigError(
            "Stage 2 learns from captions; no data set gives it class labels.",
            where="denoiser.classes",
            mend="Set it to null, or choose another denoiser.",
        )
    if net.size_numbers and not has_sizes:
        raise ConfigError(
            "These latents do not say how large their pictures were.",
            where="denoiser.size_numbers",
            mend="Precompute them again with this version, or set it to 0.",
        )
    pooled = empty.pooled_BD.shape[1]
    for key, have, want in (
        ("denoiser.in_channels", net.in_channels, channels),
        ("denoiser.out_channels", net.out_channels, channels),
        ("denoiser.context_width", net.context_width, empty.tokens_BLD.shape[2]),
        *((("denoiser.pooled_width", net.pooled_width, pooled),) if net.pooled_width is not None else ()),
    ):
        if have != want:
            raise ConfigError(f"{key} is {have}, but the latents have {want}.", where=key, mend=f"Set {key}={want}.")
    factor = artifact.config.downsampling
    key, unit = (
        ("denoiser.patch", net.patch) if net.family == "mmdit" else ("denoiser.channels", 2 ** (len(net.channels) - 1))
    )
    for height, width in shapes:
        rows, columns = height // factor, width // factor
        if rows % unit or columns % unit:
            raise ConfigError(
                f"Latents of {columns}x{rows}, of pictures of {width}x{height}, do not divide by the denoiser's {unit}.",
                where=key,
                mend=f"Make heights and widths of pictures multiples of {factor * unit}, or lower {key}.",
            )


def _verified(config: Train) -> feed.Feed:
    """The run's data sets, opened and checked; with damage.policy=skip, damage is found and counted on the way."""
    opened = feed.Feed.open(config)
    if not opened.skip_damaged:
        for one in opened.sets:
            one.verify()
    return opened
