"""Encoding and decoding large pictures in less memory: picture by picture, and in strips of rows. Both are exact.

Beyond the middle an autoencoder is a chain of 3x3 convolutions and GroupNorms: a strip needs one row of its neighbours at
each convolution, and each GroupNorm the statistics of the whole map, which are gathered strip by strip. So there are no
seams to hide, nothing is computed twice, and what is whole at a time is two feature maps, which can lie in another
device's memory. (Tiles that are decoded alone and blended have statistics of their own: their colours differ.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentray.models.autoencoder import Autoencoder, KLAutoencoder, Posterior, VQAutoencoder
from latentray.models.layers import Downsample, GroupNorm, ResBlock
from latentray.models.upsampling import Upsample

Strip = tuple[int, int]
"""First row of a map, and the row after its last."""
Convolved = KLAutoencoder | VQAutoencoder
"""Kinds that have an encoder and a decoder; the identity needs neither strips nor tiles."""


def encode_sliced(net: Autoencoder, x_BCHW: Tensor) -> Posterior:
    """`net.encode`, one picture at a time."""
    found = [net.encode(x_1CHW) for x_1CHW in x_BCHW.split(1)]
    return _joined(found)


def decode_sliced(net: Autoencoder, latent_BChw: Tensor) -> Tensor:
    """`net.decode`, one picture at a time."""
    return torch.cat([net.decode(latent_1Chw) for latent_1Chw in latent_BChw.split(1)])


def encode_in_strips(
    net: Autoencoder, x_BCHW: Tensor, *, rows: int = 32, kept_on: torch.device | None = None
) -> Posterior:
    """`net.encode` in strips of so many rows, one picture at a time: the same but for rounding.

    Args:
        rows: of a feature map, computed at a time.
        kept_on: where whole feature maps lie meanwhile, the host's memory say; None is the picture's own device.
    """
    if not isinstance(net, Convolved):
        return net.encode(x_BCHW)
    net.require_size(x_BCHW)
    with torch.no_grad():
        return _joined([net.posterior_of(_encoded(net, x, rows, kept_on)) for x in x_BCHW.split(1)])


def decode_in_strips(
    net: Autoencoder, latent_BChw: Tensor, *, rows: int = 32, kept_on: torch.device | None = None
) -> Tensor:
    """`net.decode` in strips, one picture at a time; arguments as of `encode_in_strips`."""
    if not isinstance(net, Convolved):
        return net.decode(latent_BChw)
    with torch.no_grad():
        return torch.cat([_decoded(net, latent, rows, kept_on) for latent in latent_BChw.split(1)])


def _encoded(net: Convolved, x: Tensor, rows: int, kept_on: torch.device | None) -> Tensor:
    encoder = net.encoder
    unfolded = F.pixel_unshuffle(x, encoder.patch).to(kept_on or x.device)
    h = _convolved(encoder.conv_in, unfolded, rows, x.device)
    for layer in encoder.levels:
        h = _IN_STRIPS[type(layer)](layer, h, rows, x.device)
    return encoder.finish(h.to(x.device))


def _decoded(net: Convolved, latent: Tensor, rows: int, kept_on: torch.device | None) -> Tensor:
    decoder, device = net.decoder, latent.device
    h = decoder.begin(net.decodable(latent)).to(kept_on or device)
    for layer in decoder.levels:
        h = _IN_STRIPS[type(layer)](layer, h, rows, device)
    normalised = _Normalised(decoder.norm_out, h, rows, device)
    return F.pixel_shuffle(_convolved(decoder.conv_out, h, rows, device, normalised).to(device), decoder.patch)


class _Normalised:
    """SiLU of GroupNorm over a whole map (1,C,H,W), strip by strip: y = silu(a x + b), a and b per channel.

    Mean and variance of the strips are merged in float64 (Chan et al. 1979, equations 2.1).
    """

    def __init__(self, norm: GroupNorm, h: Tensor, rows: int, device: torch.device) -> None:
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for first, last in _strips(h.shape[-2], rows):
            groups = h[:, :, first:last].to(device).unflatten(1, (norm.num_groups, -1)).float().flatten(2)
            variance, part = torch.var_mean(groups, dim=2, correction=0)
            n = groups.shape[2]
            part, variance = part.double(), variance.double()
            delta = part - mean.to(part)
            total = count + n
            squares = squares.to(part) + variance * n + delta.square() * (count * n / total)
            mean = mean.to(part) + delta * (n / total)
            count = total
        each = h.shape[1] // norm.num_groups
        mean, scale = (value.repeat_interleave(each, 1) for value in (mean, (squares / count + norm.eps).rsqrt()))
        self.scale = scale * norm.weight.double()
        self.offset = (norm.bias.double() - mean * self.scale).float()[..., None, None]
        self.scale = self.scale.float()[..., None, None]

    def __call__(self, strip: Tensor) -> Tensor:
        return F.silu(torch.addcmul(self.offset, strip.float(), self.scale), inplace=True).to(strip.dtype)


def _strips(height: int, rows: int) -> Iterator[Strip]:
    return ((first, min(first + rows, height)) for first in range(0, height, rows))


def _with_neighbours(h: Tensor, strip: Strip, device: torch.device, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """A strip with one row above and one below, `prepare`d; at the map's border those are zeros."""
    first, last = strip
    above, below = max(first - 1, 0), min(last + 1, h.shape[-2])
    rows = prepare(h[:, :, above:below].to(device))
    return F.pad(rows, (0, 0, above - first + 1, last + 1 - below))


def _rows_of(conv: nn.Conv2d, padded: Tensor) -> Tensor:
    """A 3x3 convolution that pads columns alone: the rows above and below are there already."""
    return F.conv2d(padded, conv.weight, conv.bias, stride=conv.stride, padding=(0, 1))


def _same(strip: Tensor) -> Tensor:
    return strip


def _convolved(
    conv: nn.Conv2d, h: Tensor, rows: int, device: torch.device, prepare: Callable[[Tensor], Tensor] = _same
) -> Tensor:
    out = h.new_empty(1, conv.out_channels, *h.shape[-2:])
    for first, last in _strips(h.shape[-2], rows):
        out[:, :, first:last] = _rows_of(conv, _with_neighbours(h, (first, last), device, prepare))
    return out


def _res_block(block: ResBlock, h: Tensor, rows: int, device: torch.device) -> Tensor:
    """In place, unless channels are added: a strip's rows are read for the last time when its result is there."""
    inner = _convolved(block.conv1, h, rows, device, _Normalised(block.norm1, h, rows, device))
    normalised = _Normalised(block.norm2, inner, rows, device)
    out = h[:, : inner.shape[1]] if inner.shape[1] <= h.shape[1] else h.new_empty(inner.shape)
    for first, last in _strips(h.shape[-2], rows):
        added = _rows_of(block.conv2, _with_neighbours(inner, (first, last), device, normalised))
        out[:, :, first:last] = block.skip(h[:, :, first:last].to(device)) + added
    return out


def _upsampled(layer: Upsample, h: Tensor, rows: int, device: torch.device) -> Tensor:
    out = h.new_empty(1, h.shape[1], 2 * h.shape[2], 2 * h.shape[3])
    for first, last in _strips(h.shape[-2], -(-rows // 2)):
        padded = _with_neighbours(h, (first, last), device, _same)
        twice = F.interpolate(padded, scale_factor=2.0, mode="nearest")[:, :, 1:-1]
        out[:, :, 2 * first : 2 * last] = _rows_of(layer.conv, twice)
    return out


def _downsampled(layer: Downsample, h: Tensor, rows: int, device: torch.device) -> Tensor:
    out = h.new_empty(1, h.shape[1], h.shape[2] // 2, h.shape[3] // 2)
    for first, last in _strips(out.shape[-2], rows):
        source = h[:, :, 2 * first : 2 * last + 1].to(device)
        out[:, :, first:last] = layer.conv(F.pad(source, (0, 1, 0, 2 * last + 1 - 2 * first - source.shape[-2])))
    return out


_IN_STRIPS: dict[type[nn.Module], Callable[..., Tensor]] = {
    ResBlock: _res_block,
    Upsample: _upsampled,
    Downsample: _downsampled,
}


def _joined(found: list[Posterior]) -> Posterior:
    return Posterior(
        mean_BChw=torch.cat([one.mean_BChw for one in found]), logvar_BChw=torch.cat([one.logvar_BChw for one in found])
    )
