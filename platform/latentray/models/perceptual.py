"""LPIPS, the learned perceptual distance (Zhang et al. 2018), through the `lpips` package.

Its linear weights ship with that package. Its VGG or AlexNet backbone comes from a local torchvision state dict, or from
torch hub where there is a network; without either it is random, and whoever builds it is told so.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from latentray.errors import ArtifactError, ConfigError, InputMissing
from latentray.models import torchvision_ops

NETS = ("alex", "vgg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """Where LPIPS' backbone came from: `file`, `hub` or `random`; recorded in log, manifest and W&B."""

    net: str
    source: str
    detail: str

    @property
    def is_random(self) -> bool:
        return self.source == "random"


class Perceptual(nn.Module):
    """d(x, y) for pictures in [-1, 1], (B,3,H,W) each -> (B,). Frozen, always in eval mode."""

    def __init__(self, net: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        self.net, self.backbone = net.eval().requires_grad_(False), backbone

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        return self.net(x_BCHW, y_BCHW).flatten()

    def train(self, mode: bool = True) -> Perceptual:
        return super().train(False)


def load(net: str, *, weights: str | None = None, random_backbone: bool = False, seed: int = 0) -> Perceptual:
    """Build LPIPS.

    Args:
        net: `vgg` or `alex`.
        weights: path of a torchvision state dict of the backbone (`vgg16-397923af.pth`), or None for torch hub.
        random_backbone: take a random backbone on purpose (a quickstart without downloads).
        seed: of the random backbone, so that it is the same on every worker and in every run.

    Raises ConfigError for an unknown net, InputMissing where `weights` is not there, ArtifactError where it is another file.
    """
    if net not in NETS:
        raise ConfigError(f"There is no LPIPS net {net!r}.", where="lpips.net", mend=f"Known: {', '.join(NETS)}.")
    if weights is not None and not Path(weights).is_file():
        raise InputMissing("The LPIPS backbone's weights are not there.", where=weights, mend="Check lpips.weights.")
    torchvision_ops.ensure_importable()
    import lpips

    def build(rand: bool) -> nn.Module:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            return lpips.LPIPS(net=net, pretrained=True, pnet_rand=rand, verbose=False)

    if weights is not None:
        model = build(rand=True)
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            model.net.load_state_dict({k: state["features." + k.split(".", 1)[1]] for k in model.net.state_dict()})
        except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, EOFError) as error:
            raise ArtifactError(
                f"The file holds no weights of torchvision's {net} ({type(error).__name__}).",
                where=weights,
                mend="Give the state dict that torchvision publishes, of tensors alone.",
            ) from None
        return Perceptual(model, Backbone(net=net, source="file", detail=weights))
    if random_backbone:
        return Perceptual(
            build(rand=True), Backbone(net=net, source="random", detail="asked for by lpips.random_backbone")
        )
    try:
        return Perceptual(build(rand=False), Backbone(net=net, source="hub", detail="torch hub"))
    except OSError as error:  # urllib's errors are OSErrors: no network here
        return Perceptual(
            build(rand=True), Backbone(net=net, source="random", detail=f"torch hub cannot be reached: {error}")
        )
