"""Pictures of several shapes, and their latents in buckets: what `tiny.py` writes, but not all square."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from latentray.checkpoint import manifest
from latentray.config.precompute_latents import LatentBucketsConfig, PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import index, precompute, shards, synthetic

SIZES = ((40, 40), (64, 64), (60, 100), (100, 60))
"""(height, width) of the pictures: of the shapes (32, 32), (64, 64), (48, 80) and (80, 48) in buckets of 32 and 64 by 16."""
SHAPES = ((32, 32), (48, 80), (64, 64), (80, 48))
BUCKETS = {"sizes": [32, 64], "step": 16}
N, SHARDS = 72, 3


def write_pictures(root: Path, split: str, n: int = N) -> str:
    """Shards whose samples are in the order of their buckets, as latents in buckets are stored; the data set's URI."""
    folder = root / f"built-{split}"
    folder.mkdir(parents=True)
    each = n // SHARDS

    def sample(i: int) -> shards.Sample:
        kind = synthetic.kind_of(split, i)
        height, width = (SIZES[0], SIZES[2], SIZES[1], SIZES[3])[i % each * len(SIZES) // each]
        buffer = io.BytesIO()
        picture = Image.fromarray(synthetic.draw(kind, 0, i, split=split)).resize((width, height))
        picture.save(buffer, "PNG", compress_level=1)
        caption = synthetic.caption(kind)
        return shards.Sample(
            key=f"{i:09d}",
            members={
                "png": buffer.getvalue(),
                "json": json.dumps({"captions": [caption, f"{caption}, drawn"]}).encode(),
            },
            columns={"width": width, "height": height},
        )

    made = [
        shards.write_shard(map(sample, range(k * each, (k + 1) * each)), folder / shards.shard_name(k))
        for k in range(SHARDS)
    ]
    index.write(made, folder / index.NAME)
    uri = str(root / "data" / split)
    manifest.publish(folder, uri, kind="dataset")
    return uri


def build_all(root: Path, tiny, given: dict[str, str]) -> dict[str, str]:
    """`data`, and latents of it: `squares` of 64 and `buckets`; by the encoders that `tiny.build_all` gave."""
    write_pictures(root, "train")
    write_pictures(root, "validation", 12)
    data = str(root / "data")
    encoders = {"autoencoder": given["autoencoder"], "text_source": given["text_encoder"]}
    out = str(root / "buckets")
    with pytest.MonkeyPatch.context() as patch:
        squares = tiny.write_latents(root, patch, data=data, **encoders)
        precompute.precompute(
            PrecomputeLatents(
                data=data, autoencoder_from=given["autoencoder"], out=out, batch_size=16, text_dtype="float32",
                device="cpu", text_encoder=TextEncoderConfig(source=given["text_encoder"]),
                buckets=LatentBucketsConfig(**BUCKETS),
            )
        )  # fmt: skip
    return {"data": data, "squares": squares, "buckets": out}
