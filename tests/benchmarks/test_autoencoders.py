"""What encoding and decoding cost beside diffusers' with the same weights: ratios within one run. `make bench` prints them.

Stable Diffusion's KL-f8 at full size, bf16 on one thread, diffusers' with channels last: its best mode, four times as fast
as its default. Each is timed in turn, in CPU seconds of the one thread, which other work on the machine disturbs least.
Beside them stands the ceiling: the same convolutions alone, on maps that are there already.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interleaved import medians, products_of
from torch import nn

from latentray import build
from latentray.checkpoint import interop_autoencoders as interop
from latentray.config.autoencoder import AutoencoderConfig
from latentray.models import torchvision_ops
from latentray.models.autoencoder import Autoencoder

torchvision_ops.ensure_importable()
from diffusers import AutoencoderKL  # noqa: E402  (it imports torchvision)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CONFIG = AutoencoderConfig()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair() -> tuple[Autoencoder, nn.Module]:
    ours = build.seeded(lambda: build.autoencoder(CONFIG), 0).eval().requires_grad_(False)
    described, state = interop.to_diffusers_kl(CONFIG, ours.state_dict(), shift=0.0, scale=1.0, size=128)
    theirs = AutoencoderKL(**described).eval().requires_grad_(False)
    theirs.load_state_dict(state)
    return tuple(net.to(dtype=torch.bfloat16, memory_format=torch.channels_last) for net in (ours, theirs))


@torch.no_grad()
@pytest.mark.parametrize("way", ["encode", "decode"])
@pytest.mark.parametrize(("batch", "size"), [(2, 128), (1, 256)])
def test_encoding_and_decoding(way: str, batch: int, size: int) -> None:
    ours, theirs = pair()
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, size, size) if way == "encode" else (batch, 4, size // 8, size // 8)
    given = torch.randn(shape, generator=generator).clamp(-1, 1).bfloat16()
    given = given.contiguous(memory_format=torch.channels_last)
    if way == "encode":
        calls = {
            "ours": lambda: ours.encode(given).mean_BChw,
            "diffusers": lambda: theirs.encode(given).latent_dist.mean,
        }
    else:
        calls = {"ours": lambda: ours.decode(given), "diffusers": lambda: theirs.decode(given).sample}
    got, expected = calls["ours"]().float(), calls["diffusers"]().float()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    found = medians(calls | {"diffusers' convolutions alone": products_of(theirs, calls["diffusers"], (nn.Conv2d,))})
    print(f"\n{way}, {batch} x {size} pixels, bf16, channels last")
    for name, value in found.items():
        print(f"  {name:30s} {value * 1e3:8.1f} ms, {found['diffusers'] / value:.2f}x diffusers")
    assert found["ours"] < found["diffusers"]
