"""Configuration (and weights) -> networks, from literal registries. Never an optimiser."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from latentray.checkpoint import manifest, store, weights
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ArtifactError, ConfigError
from latentray.models.autoencoder import KLAutoencoder, LatentScale
from latentray.models.mmdit import MMDiT
from latentray.models.unet import UNet

Net = TypeVar("Net", bound=nn.Module)
AUTOENCODER_FORMAT = 1
Denoiser = UNet | MMDiT
_DENOISERS: dict[str, Callable[[DenoiserConfig], Denoiser]] = {"unet": UNet, "mmdit": MMDiT}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderArtifact:
    """An autoencoder that stage 1 made: architecture, latent scale and weights, verified."""

    uri: str
    digest: str
    """Of its manifest."""
    fingerprint: str
    """sha256 over weights, architecture, shift and scale: what latents belong to."""
    config: AutoencoderConfig
    scale: LatentScale
    size: int
    """Pixels of the square it was trained on."""
    weights: Path
    """A local, verified copy of the weights."""

    def load(self) -> KLAutoencoder:
        """The network, frozen, in eval mode."""
        return autoencoder(self.config, weights.read(self.weights), where=self.uri)


def autoencoder_artifact(uri: str) -> AutoencoderArtifact:
    """Open the artifact at a URI. Raises InputMissing, ArtifactError, DigestMismatch."""
    found = manifest.read(uri, kind="autoencoder")
    described = json.loads(manifest.fetch_file(uri, "config.json", found).read_text())
    if described.get("format") != AUTOENCODER_FORMAT:
        raise ArtifactError(
            f"The autoencoder has format {described.get('format')!r}.",
            where=uri,
            mend=f"Format {AUTOENCODER_FORMAT} is read.",
        )
    path = manifest.fetch_file(uri, "autoencoder.safetensors", found)
    decides = {key: described[key] for key in ("autoencoder", "shift", "scale")}
    return AutoencoderArtifact(
        uri=uri,
        digest=found.digest,
        fingerprint=store.digest_of(decides | {"weights": found.files["autoencoder.safetensors"].sha256}),
        config=AutoencoderConfig(**described["autoencoder"]),
        scale=LatentScale(shift=described["shift"], scale=described["scale"]),
        size=described["size"],
        weights=path,
    )


def write_autoencoder(
    folder: Path, config: AutoencoderConfig, state: Mapping[str, Tensor], *, scale: LatentScale, size: int
) -> None:
    """Write the files of an autoencoder artifact locally, ready for `manifest.publish(kind="autoencoder")`."""
    weights.save(folder / "autoencoder.safetensors", state)
    described = {"format": AUTOENCODER_FORMAT, "autoencoder": as_dict(config), "size": size} | dataclasses.asdict(scale)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def autoencoder(
    config: AutoencoderConfig, state: Mapping[str, Tensor] | None = None, *, where: str = ""
) -> KLAutoencoder:
    """An autoencoder, with its weights where they are given."""
    return _filled(KLAutoencoder(config), state, where)


def denoiser(config: DenoiserConfig, state: Mapping[str, Tensor] | None = None, *, where: str = "") -> Denoiser:
    """A denoiser, with its weights where they are given."""
    return _filled(_DENOISERS[config.family](config), state, where)


def seeded(make: Callable[[], Net], seed: int) -> Net:
    """Call `make()` with torch's initialisers seeded: every worker builds the same network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def as_dict(config: Any) -> dict[str, Any]:
    """A model's configuration as JSON values."""
    return dataclasses.asdict(config)


def device(name: str) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU. Raises ConfigError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device {name!r}.", where="device", mend="Use auto, cpu or cuda.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no usable GPU.", where="device", mend="Use device=auto or device=cpu.")
    return found


def _filled(module: Net, state: Mapping[str, Tensor] | None, where: str) -> Net:
    if state is not None:
        weights.load_into(module, state, where=where)
        module.eval().requires_grad_(False)
    return module


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
