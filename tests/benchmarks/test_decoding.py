"""What a training picture costs: ratios within one run. `make bench` prints them."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image
from webdataset.autodecode import imagehandler

from latentray.data import decode, transforms

pytestmark = pytest.mark.slow
SIZE = 256


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """A photograph's spectrum (amplitude 1/f), and the fine grain that makes a JPEG of 512 x 512 about 100 kB long."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(height, width)
    planes = []
    for _ in range(3):
        plane = np.fft.irfft2(np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**1.4, s=(height, width))
        planes.append(plane / plane.std())
    grain = rng.normal(size=(height, width))
    mixed = [128 + 35 * planes[0] + 12 * plane + 2 * grain for plane in planes]
    return np.clip(np.stack(mixed, -1), 0, 255).astype(np.uint8)


def files(height: int, width: int, kind: str, **options: int) -> list[bytes]:
    buffers = [io.BytesIO() for _ in range(8)]
    for seed, buffer in enumerate(buffers):
        Image.fromarray(photograph(height, width, seed)).save(buffer, kind, **options)
    return [buffer.getvalue() for buffer in buffers]


def with_pillow(data: bytes) -> np.ndarray:
    """WebDataset's own decoder, then Pillow's best filter."""
    image = imagehandler("pil")(".jpg", data)
    scale = SIZE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    return np.asarray(image)[top : top + SIZE, left : left + SIZE]


def with_ours(data: bytes) -> np.ndarray:
    pixels_HWC, size = decode.decode_at_least(data, SIZE, SIZE)
    return transforms.resized_crop(pixels_HWC, SIZE, SIZE, original_size=size)[0]


def seconds_each(reads: Sequence[Callable[[bytes], np.ndarray]], pictures: Sequence[bytes]) -> list[float]:
    """Median seconds per picture of each, taken in turns, so that what else the machine does meets all alike."""
    seconds: list[list[float]] = [[] for _ in reads]
    for _ in range(15):
        for read, taken in zip(reads, seconds, strict=True):
            begin = time.perf_counter()
            for data in pictures:
                read(data)
            taken.append((time.perf_counter() - begin) / len(pictures))
    return [statistics.median(taken) for taken in seconds]


def psnr(pictures: Sequence[bytes]) -> float:
    """Decibels between the two ways: the least over the pictures."""
    errors = [np.mean((with_ours(data).astype(float) - with_pillow(data)) ** 2) for data in pictures]
    return float(10 * np.log10(255**2 / max(errors))) if max(errors) else float("inf")


def test_half_scale_jpeg_against_webdataset_and_pillow() -> None:
    pictures = files(512, 512, "JPEG", quality=90)
    theirs, ours = seconds_each([with_pillow, with_ours], pictures)
    decibels, kilobytes = psnr(pictures), sum(map(len, pictures)) / len(pictures) / 1000
    print(
        f"\nJPEG 512 ({kilobytes:.0f} kB) -> 256: WebDataset + Pillow {1 / theirs:.0f}/s, ours {1 / ours:.0f}/s,"
        f" {theirs / ours:.2f}x at {decibels:.1f} dB"
    )
    assert decibels >= 35
    assert theirs / ours >= 2.5


@pytest.mark.parametrize(
    ("height", "width", "kind"), [(600, 800, "JPEG"), (2000, 3000, "JPEG"), (256, 256, "JPEG"), (1024, 1024, "PNG")]
)
def test_other_pictures_are_no_slower(height: int, width: int, kind: str) -> None:
    pictures = files(height, width, kind)[:2]
    theirs, ours = seconds_each([with_pillow, with_ours], pictures)
    print(
        f"\n{kind} {width}x{height} -> 256: WebDataset + Pillow {1 / theirs:.0f}/s, ours {1 / ours:.0f}/s,"
        f" {theirs / ours:.2f}x at {psnr(pictures):.1f} dB"
    )
    assert theirs / ours >= 0.9
