"""A small picture classifier whose penultimate layer serves as feature network where no pretrained one is at hand."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SIZE = 64
"""Height and width it takes, in pixels."""

FEATURES = 64
"""Width D of its features: small, so that a few hundred pictures determine their covariance."""

_UNSHUFFLE = 4  # convolutions at full resolution cost most and add little here


class PictureClassifier(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] -> logits (B, classes); `features` -> (B, 64).

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.stem = nn.Conv2d(3 * _UNSHUFFLE**2, 48, 3, padding=1)
        self.down1 = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, width) for width in (48, 64, 64))
        self.neck = nn.Linear(64 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """(B, 64): what the linear head reads."""
        h = F.pixel_unshuffle(2 * x_BCHW - 1, _UNSHUFFLE)
        h = F.relu(self.norm1(self.stem(h)))
        h = F.relu(self.norm2(self.down1(h)))
        h = F.relu(self.norm3(self.down2(h)))
        h = self.neck(h.flatten(1))
        return F.layer_norm(h, h.shape[1:])  # of unit scale, so that KID's cubic kernel is too

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.features(x_BCHW))
