"""Whether the parts of a pipeline go together, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from latentray import build
from latentray.checkpoint import weights
from latentray.checkpoint.foreign_layout import State
from latentray.config.autoencoder import AutoencoderConfig
from latentray.errors import ConfigError
from latentray.interchange import encoders
from latentray.interchange.layouts import Pipeline


def require(pipeline: Pipeline, *, where: str) -> None:
    """Check every part's weights against its configuration, and the parts against one another.

    Raises ArtifactError naming the first weight of another shape, both shapes and how many more; ConfigError where text
    encoders do not fit the denoiser's cross-attention, or latents do not fit its channels.
    """
    _require_widths(pipeline)
    _require_weights(lambda: build.denoiser(pipeline.denoiser), pipeline.denoiser_state, f"{where} (denoiser)")
    require_autoencoder(pipeline.autoencoder, pipeline.autoencoder_state, where=f"{where} (vae)")
    for encoder in pipeline.encoders:
        encoders.require_fit(encoder, where=f"{where} ({encoder.name})")


def require_autoencoder(config: AutoencoderConfig, state: State, *, where: str) -> None:
    """Raise ArtifactError naming the first weight of another shape than the configuration's."""
    _require_weights(lambda: build.autoencoder(config), state, where)


def _require_weights(make: Callable[[], nn.Module], state: State, where: str) -> None:
    with torch.device("meta"):
        network = make()
    weights.load_into(network, {key: _weightless(value) for key, value in state.items()}, where=where)


def _weightless(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta")


def _require_widths(pipeline: Pipeline) -> None:
    config, described = pipeline.denoiser, [one.described for one in pipeline.encoders]
    widths = [_width(one) for one in described]
    tokens = {"sdxl": sum(widths), "sd3": max(widths[-1], sum(widths[:-1]))}.get(pipeline.layout.name, widths[0])
    if config.context_width != tokens:
        raise ConfigError(
            f"The text encoders give tokens {tokens} wide, and the denoiser reads {config.context_width}.",
            where="denoiser.context_width",
            mend="Give a pipeline with its own text encoders.",
        )
    if config.pooled_width is not None:
        projected = [int(one["projection_dim"]) for one in described if "projection_dim" in one]
        pooled = sum(projected) if pipeline.layout.name == "sd3" else projected[-1]
        if config.pooled_width != pooled:
            raise ConfigError(
                f"The text encoders give pooled text {pooled} wide, and the denoiser reads {config.pooled_width}.",
                where="denoiser.pooled_width",
                mend="Give a pipeline with its own text encoders.",
            )
    channels = pipeline.autoencoder.latent_channels
    if config.out_channels != channels or not (config.in_channels == channels or pipeline.paints):
        raise ConfigError(
            f"The denoiser takes {config.in_channels} channels and gives {config.out_channels}, and latents have {channels}.",
            where="denoiser.in_channels",
            mend="Give a pipeline that draws from text, with or without a mask.",
        )


def _width(described: dict[str, Any]) -> int:
    return int(described.get("hidden_size") or described["d_model"])
