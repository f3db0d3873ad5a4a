"""What a run learns from: its data sets and the encoders behind them, opened and checked before a worker starts."""

from __future__ import annotations

from collections.abc import Sequence, Set

from latentray import build
from latentray.conditioning import combination
from latentray.conditioning.tokens import TokenReader
from latentray.config.train import Train
from latentray.data import latents, sample_facts
from latentray.diffusion import samplers, schedules
from latentray.errors import ConfigError
from latentray.models import perceptual
from latentray.records import Conditions
from latentray.training import denoiser_weights, episode_supply, feed, initial_weights, latent_supply
from latentray.training.feed import Shape


def check(config: Train, world: int) -> dict[str, str]:
    """The digests of a run's inputs. Raises ConfigError, InputMissing, DigestMismatch or FingerprintMismatch for what
    `world` workers could not train on."""
    config.require_divisible(world)
    if config.stage.name == "autoencoder":
        return _pictures(config)
    if config.stage.name == "diffusion":
        _require_sampler(config)
    initial = denoiser_weights.lineage(denoiser_weights.find(config))
    return _SUPPLIES[latent_supply.kind(config)](config, world) | initial


def _pictures(config: Train) -> dict[str, str]:
    if not config.data and not config.mixture.of:
        raise ConfigError("Stage 1 needs pictures.", where="data", mend="Add data=<what build_shards wrote>.")
    opened = _verified(config)
    lpips = config.stage.lpips
    if lpips.weights is not None and lpips.weight > 0:
        perceptual.load(lpips.net, weights=lpips.weights)
    begun = initial_weights.autoencoder(config)
    return opened.inputs | ({"autoencoder": begun.digest} if begun else {})


def _episodes(config: Train, world: int) -> dict[str, str]:
    if not config.data and not config.mixture.of:
        raise ConfigError(
            "A policy learns from episodes.", where="data", mend="Add data=<what build_shards wrote of them>."
        )
    opened = _verified(config)
    episode_supply.space_of(config, opened)
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
        _require_frames(config, one)
    _require_labels(config, opened)
    if opened.buckets:
        fewest = config.cluster.min_workers if config.cluster.kind == "ray" else None
        for workers in range(fewest or world, world + 1):
            config.require_buckets_divisible(workers)
    texts = first.texts[: combination.taken(config.denoiser, len(first.texts))]
    empty = latent_supply.empty(config.denoiser, first.empty_prompts(texts))
    columns = set.intersection(*(set(one.index.table.column_names) for one in opened.sets))
    _require_denoiser(
        config, artifact, empty, opened.shapes, columns, max((one.vocabulary for one in texts), default=0)
    )
    return opened.inputs | {"autoencoder": artifact.digest}


def _online(config: Train, world: int) -> dict[str, str]:
    if not config.data and not config.mixture.of:
        raise ConfigError("There is nothing to encode.", where="data", mend="Add data=<what build_shards wrote>.")
    if not config.autoencoder_from:
        raise ConfigError(
            "Pictures are encoded by an autoencoder.",
            where="autoencoder_from",
            mend="Add autoencoder_from=<what stage 1 made>.",
        )
    artifact = build.autoencoder_artifact(latent_supply.autoencoder_uri(config))
    encoders = [one for one, _ in latent_supply.load_encoders(config)]
    opened = _verified(config)
    _require_labels(config, opened)
    for height, width in opened.shapes:
        if height % artifact.config.downsampling or width % artifact.config.downsampling:
            raise ConfigError(
                f"Pictures of {width}x{height} do not divide by the autoencoder's {artifact.config.downsampling}.",
                where="buckets.step" if opened.buckets else "size",
                mend=f"Choose a multiple of {artifact.config.downsampling}.",
            )
    empty = latent_supply.empty(config.denoiser, [one.nothing() for one in encoders])
    vocabulary = max((one.vocabulary for one in encoders if isinstance(one, TokenReader)), default=0)
    _require_denoiser(config, artifact, empty, opened.shapes, {*latents.CONDITIONS}, vocabulary)
    digests = latent_supply.by_encoder(encoders, lambda one: one.digest)
    return opened.inputs | {"autoencoder": artifact.digest} | digests


_SUPPLIES = {"online": _online, "stored": _latents, "episodes": _episodes}


def _require_labels(config: Train, opened: feed.Feed) -> None:
    if config.denoiser.classes is not None:
        sample_facts.require_labels(opened.sets, classes=config.denoiser.classes)


def _require_frames(config: Train, one: latents.LatentStore) -> None:
    """Raise ConfigError for clips where pictures are drawn, and for pictures where clips are."""
    of_clips = config.denoiser.family == "video"
    if one.frames and not of_clips:
        raise ConfigError(
            f"These are latents of clips of {one.frames} frames, and the denoiser draws pictures.",
            where=one.uri,
            mend="Give latents of pictures, or a denoiser of the family video.",
        )
    if of_clips and not one.frames:
        raise ConfigError(
            "The denoiser draws clips, and these latents have no frames.",
            where=one.uri,
            mend="Precompute latents of clips, with clip.frames and clip.fps, or give an image denoiser.",
        )


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
    empty: Conditions,
    shapes: Sequence[Shape],
    told: Set[str],
    vocabulary: int,
) -> None:
    """Raise ConfigError for a denoiser that does not fit the latents, or their captions.

    Args:
        empty: embeddings of the empty caption, as wide as all are.
        shapes: (height, width) of the pictures behind the latents, pixels.
        told: what the data set's index says of each sample.
        vocabulary: how many tokens the tokenizer of a learned text encoder has.
    """
    net, channels = config.denoiser, artifact.config.latent_channels
    if net.size_numbers and not set(latents.CONDITIONS) <= told:
        raise ConfigError(
            "These latents do not say how large their pictures were.",
            where="denoiser.size_numbers",
            mend="Precompute them again with this version, or set it to 0.",
        )
    text = combination.combine(net, empty.texts)
    numbers = text is not None and not text.tokens_BLD.is_floating_point()
    if text is not None and numbers:
        _require_learned(config, text.tokens_BLD.shape[1], vocabulary)
    elif net.context_layers:
        raise ConfigError(
            "A learned text encoder reads token numbers, and these are embeddings.",
            where="denoiser.context_layers",
            mend="Give an encoder of kind tokens, or set it to 0.",
        )
    widths = (text.tokens_BLD.shape[2], text.pooled_BD.shape[1]) if text is not None else (None, None)
    if numbers:
        widths = (net.context_width, None)
    drawn = None if net.family == "classifier" else net.out_channels
    for key, have, want in (
        ("denoiser.in_channels", net.in_channels, channels + config.beside.channels(channels)),
        ("denoiser.out_channels", drawn, channels * (2 if config.objective.learned_variance else 1)),
        ("denoiser.context_width", net.context_width, widths[0]),
        ("denoiser.pooled_width", net.pooled_width, widths[1]),
    ):
        if have is not None and have != want:
            raise ConfigError(f"{key} is {have}, but the latents have {want}.", where=key, mend=f"Set {key}={want}.")
    net.require_shapes(shapes, artifact.config.downsampling)


def _require_learned(config: Train, tokens: int, vocabulary: int) -> None:
    """Raise ConfigError for token numbers that the denoiser's own text encoder does not take."""
    net = config.denoiser
    if not net.context_layers:
        raise ConfigError(
            "These are token numbers, and the denoiser has no text encoder of its own.",
            where="denoiser.context_layers",
            mend="Set it to 8, say, with context_vocabulary, or give a text encoder.",
        )
    for field, have, want in (
        ("tokens", net.context_tokens, tokens),
        ("vocabulary", net.context_vocabulary, vocabulary),
    ):
        if have is None or have < want:
            raise ConfigError(
                f"The tokenizer gives {want} {'tokens of a caption' if field == 'tokens' else 'different tokens'}.",
                where=f"denoiser.context_{field}",
                mend=f"Set it to {want} or more.",
            )


def _verified(config: Train) -> feed.Feed:
    """The run's data sets, opened and checked; with damage.policy=skip, damage is found and counted on the way."""
    opened = feed.Feed.open(config)
    if not opened.skip_damaged:
        for one in opened.sets:
            one.verify()
    return opened
