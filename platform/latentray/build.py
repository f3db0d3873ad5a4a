"""Configuration (and weights) -> networks, from literal registries. Never an optimiser."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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
from latentray.models.autoencoder import (
    Autoencoder,
    IdentityAutoencoder,
    KLAutoencoder,
    LatentScale,
    VQAutoencoder,
)
from latentray.models.mmdit import MMDiT
from latentray.models.noisy_classifier import NoisyClassifier
from latentray.models.policy import ActionUNet
from latentray.models.unet import UNet
from latentray.models.video import VideoUNet

Net = TypeVar("Net", bound=nn.Module)
AUTOENCODER_FORMAT = 2
"""1 did not say which latents it belongs to: all of its weights decided that; it is read too."""
IDENTITY = "identity"
"""The URI of the autoencoder that is none, without an artifact: latents are pixels."""
_IDENTITY_SIZE = 64
_AUTOENCODERS: dict[str, Callable[[AutoencoderConfig], Autoencoder]] = {
    "kl": KLAutoencoder,
    "vq": VQAutoencoder,
    "identity": IdentityAutoencoder,
}
Denoiser = UNet | MMDiT | ActionUNet | NoisyClassifier
"""Networks of noisy samples; the classifier is trained, exported and planned as the others are, and denoises nothing."""
_DENOISERS: dict[str, Callable[[DenoiserConfig], Denoiser]] = {
    "unet": UNet,
    "mmdit": MMDiT,
    "video": VideoUNet,
    "policy": ActionUNet,
    "classifier": NoisyClassifier,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderArtifact:
    """An autoencoder that stage 1 made, or the identity: architecture, latent scale and weights, verified."""

    uri: str
    digest: str
    """Of its manifest."""
    fingerprint: str
    """What latents belong to: sha256 over the encoder, shift and scale. A decoder that was trained on shares it."""
    config: AutoencoderConfig
    scale: LatentScale
    size: int
    """Pixels of the square it was trained on; the identity takes any."""
    weights: Path
    """A local, verified copy of the weights."""

    def state(self) -> dict[str, Tensor]:
        return weights.read(self.weights)

    def load(self) -> Autoencoder:
        """The network, frozen, in eval mode."""
        return autoencoder(self.config, self.state(), where=self.uri)


def autoencoder_artifact(uri: str) -> AutoencoderArtifact:
    """Open the artifact at a URI; `identity` is one without files. Raises InputMissing, ArtifactError, DigestMismatch."""
    if uri == IDENTITY or (uri == store.absolute(IDENTITY) and not store.exists(store.join(uri, manifest.NAME))):
        return _identity()
    found = manifest.read(uri, kind="autoencoder")
    described = json.loads(manifest.fetch_file(uri, "config.json", found).read_text())
    if described.get("format") not in (1, AUTOENCODER_FORMAT):
        raise ArtifactError(
            f"The autoencoder has format {described.get('format')!r}.",
            where=uri,
            mend=f"Formats 1 and {AUTOENCODER_FORMAT} are read.",
        )
    path = manifest.fetch_file(uri, "autoencoder.safetensors", found)
    decides = {key: described[key] for key in ("autoencoder", "shift", "scale")}
    older = store.digest_of(decides | {"weights": found.files["autoencoder.safetensors"].sha256})
    return AutoencoderArtifact(
        uri=uri,
        digest=found.digest,
        fingerprint=described.get("latents", older),
        config=AutoencoderConfig(**described["autoencoder"]),
        scale=LatentScale(shift=described["shift"], scale=described["scale"]),
        size=described["size"],
        weights=path,
    )


def _identity() -> AutoencoderArtifact:
    config = AutoencoderConfig(kind="identity", in_channels=3, latent_channels=3)
    scale = LatentScale(shift=0.0, scale=1.0)
    constant = fingerprint_of(config, {}, scale)
    path = store.cache_dir() / "identity.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with store.staging() as folder:
            weights.save(folder / path.name, {})
            store.upload(folder / path.name, path)
    return AutoencoderArtifact(
        uri=IDENTITY,
        digest=constant,
        fingerprint=constant,
        config=config,
        scale=scale,
        size=_IDENTITY_SIZE,
        weights=path,
    )


def write_autoencoder(
    folder: Path,
    config: AutoencoderConfig,
    state: Mapping[str, Tensor],
    *,
    scale: LatentScale,
    size: int,
    fingerprint: str | None = None,
) -> None:
    """Write the files of an autoencoder artifact locally, ready for `manifest.publish(kind="autoencoder")`.

    Args:
        fingerprint: that of the autoencoder whose encoder and scale these are, where only the decoder was trained.
    """
    weights.save(folder / "autoencoder.safetensors", state)
    described = {
        "format": AUTOENCODER_FORMAT,
        "autoencoder": as_dict(config),
        "size": size,
        "latents": fingerprint or fingerprint_of(config, state, scale),
    }
    (folder / "config.json").write_text(json.dumps(described | dataclasses.asdict(scale), indent=2) + "\n")


def fingerprint_of(config: AutoencoderConfig, state: Mapping[str, Tensor], scale: LatentScale) -> str:
    """What an autoencoder's latents belong to: sha256 over all that they depend on."""
    if config.kind == IDENTITY:
        return store.digest_of({"autoencoder": IDENTITY})
    encoder = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith("encoder.")):
        value = state[name].detach().cpu().contiguous()
        encoder.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        encoder.update(value.reshape(-1).view(torch.uint8).numpy())
    return store.digest_of(
        {"autoencoder": as_dict(config), "encoder": encoder.hexdigest(), **dataclasses.asdict(scale)}
    )


def autoencoder(
    config: AutoencoderConfig, state: Mapping[str, Tensor] | None = None, *, where: str = ""
) -> Autoencoder:
    """An autoencoder, with its weights where they are given."""
    return _filled(_AUTOENCODERS[config.kind](config), state, where)


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


def device(name: str, *, where: str = "device") -> torch.device:
    """`auto` is the GPU where there is one, else the CPU. Raises ConfigError for a device this machine lacks.

    Args:
        where: the setting that an error names.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device {name!r}.", where=where, mend="Use auto, cpu or cuda.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("This machine has no usable GPU.", where=where, mend=f"Use {where}=auto or {where}=cpu.")
    return found


def require_compiler() -> None:
    """Raise ConfigError where torch.compile has no C++ compiler to call."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        raise ConfigError(
            "Compiling the network, or Muon's kernels, needs a C++ compiler, and none was found.",
            where="compile",
            mend="Install g++ (or name another by the variable CXX), or set compile=false, and another optimizer than muon.",
        ) from None


def tuned(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """How torch.compile treats networks whose weights stay as they are; to be entered around their calls, without gradients.

    On a CPU it lays the weights out for the products that they are in, once instead of at each call. (Timing several loops for
    each size of these too, `max_autotune_gemm`, brings another tenth, for twice the minutes of compiling.)
    """
    if device.type != "cpu":
        return contextlib.nullcontext()
    from torch._inductor import config

    return config.patch(freezing=True)  # type: ignore[no-any-return]


def _filled(module: Net, state: Mapping[str, Tensor] | None, where: str) -> Net:
    if state is not None:
        weights.load_into(module, state, where=where)
        module.eval().requires_grad_(False)
    return module


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
