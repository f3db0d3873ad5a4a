"""An autoencoder in diffusers' layout: a pipeline's, or one that lies alone in its folder (sd-vae-ft-mse, sdxl-vae)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentray.checkpoint import interop_autoencoders
from latentray.checkpoint.interop_autoencoders import ReadAutoencoder
from latentray.errors import ConfigError
from latentray.interchange import fitting, folders, layouts
from latentray.interchange.layouts import Layout

_READERS = {
    "AutoencoderKL": interop_autoencoders.from_diffusers_kl,
    "VQModel": interop_autoencoders.from_diffusers_vq,
}


def read(folder: Path, *, variant: str | None = None, where: str) -> ReadAutoencoder:
    """The autoencoder of a pipeline, whatever its denoiser is, or the one that lies alone in a local folder.

    Args:
        where: where the folder came from, for errors.

    Raises ConfigError for another class than those read here and for a setting that latentray does not build, InputMissing for
    a part that is not there, ArtifactError for weights of another shape than their configuration's.
    """
    if (folder / folders.INDEX).is_file():
        found = of_pipeline(folder, layouts.known(folders.read_json(folder / folders.INDEX)), variant=variant)
    else:
        found = _read(folder, variant, tuple(_READERS), where)
    fitting.require_autoencoder(found.config, found.state, where=where)
    return found


def of_pipeline(folder: Path, layout: Layout | None, *, variant: str | None = None) -> ReadAutoencoder:
    """A pipeline's autoencoder, with the shift and the size that the pipeline draws with; its weights are not checked.

    Args:
        layout: None for a pipeline that is not exchanged: then they are the autoencoder's own.
    """
    found = _read(folder / "vae", variant, ("AutoencoderKL",), "vae")
    if layout is None:
        return found
    side = folders.read_json(folder / layout.denoiser / "config.json").get("sample_size")
    return dataclasses.replace(
        found,
        # The pipelines of SD 1, SD 2 and SDXL do not look at a shift.
        shift=found.shift if layout.name == "sd3" else 0.0,
        size=side * found.config.downsampling if isinstance(side, int) else found.size,
    )


def _read(folder: Path, variant: str | None, known: Sequence[str], where: str) -> ReadAutoencoder:
    described: dict[str, Any] = folders.read_json(folder / "config.json")
    name = described.get("_class_name", known[0])
    if name not in known:
        raise ConfigError(
            f"{name!r} is read as no autoencoder here.",
            where=f"{where}/config.json",
            mend=f"Give one of the class {' or '.join(known)}.",
        )
    return _READERS[name](described, folders.read_weights(folder, variant=variant))
