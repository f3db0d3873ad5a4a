"""What `test_online.py` measures, in one process: steps of stage 2 on stored and on online latents, in turns with their parts,
and how long a run waits for stored ones.

    online_steps.py <folder> <port>

Writes the inputs into the folder, and prints one line of JSON.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from latentray import build
from latentray.checkpoint import manifest
from latentray.conditioning import tiny_text_encoder
from latentray.config import compose
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig, TinyTextEncoderConfig
from latentray.config.train import Train
from latentray.data import index, latent_parts, latent_shards, precompute, shards
from latentray.data.canonical import CaptionEmbedder, encode
from latentray.data.latent_encoder import Encoder
from latentray.models.autoencoder import KLAutoencoder, LatentScale
from latentray.tracking import names
from latentray.training import launch
from latentray.training.ema import EMA
from latentray.training.stage2 import DiffusionStage
from latentray.training.state import Worker

SIZE, BATCH, ROUNDS = 64, 32, 15
N = BATCH * (ROUNDS + 2)
AUTOENCODER = AutoencoderConfig(channels=[64, 128], blocks=1, patch=2, attention=False, groups=8)
TEXT = TinyTextEncoderConfig(width=768, layers=1, heads=12, max_tokens=77, vocabulary=600)
SETTINGS = [
    "stage=diffusion", "denoiser=unet_shapes", "denoiser.channels=[64,64]", "denoiser.context_width=768",
    "objective=v", f"size={SIZE}", f"global_batch_size={BATCH}", f"total_samples={N}", "precision=fp32",
    "deepspeed=zero1", "cluster=none", "cluster.device=cpu", "cluster.threads=1", "tracking=none",
    "checkpoint_every_samples=0", "stage.sampling_steps=2", f"log_every_samples={4 * BATCH}",
]  # fmt: skip


def _in_process(config, job, work):
    """The stages of the latent job's Ray graph, one after another in this process."""
    encoder = Encoder(job)
    for one in work:
        names = [latent_shards.write_part(job, encoder.encode(latent_parts.read_part(job, part))) for part in one.left]
        latent_shards.assemble(job, one.split, one.name, names)
        yield one


def caption(number: int) -> str:
    return f"a picture of {number} of the {number * 7919 % 1009} things that were drawn at random"


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((320, 256)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_inputs(root: Path) -> dict[str, str]:
    """JPEGs of 320 x 256 with a caption each, encoders with random weights, and latents: fp32, embeddings fp16 of 77 x 768."""
    (root / "built").mkdir(parents=True)

    def sample(i: int) -> shards.Sample:
        members = {"jpg": jpeg(i), "txt": caption(i).encode()}
        return shards.Sample(key=f"{i:06d}", members=members, columns={"width": 320, "height": 256})

    cuts = [range(i, min(i + 64, N)) for i in range(0, N, 64)]
    made = [shards.write_shard(map(sample, cut), root / "built" / shards.shard_name(k)) for k, cut in enumerate(cuts)]
    index.write(made, root / "built" / index.NAME)
    manifest.publish(root / "built", root / "data" / "train", kind="dataset")
    net = build.seeded(lambda: KLAutoencoder(AUTOENCODER), 0)
    (root / "net").mkdir()
    build.write_autoencoder(root / "net", AUTOENCODER, net.state_dict(), scale=LatentScale(shift=0, scale=1), size=SIZE)
    manifest.publish(root / "net", root / "autoencoder", kind="autoencoder")
    text = str(root / "text")
    tiny_text_encoder.publish(text, map(caption, range(N)), TEXT)
    found = {name: str(root / name) for name in ("data", "autoencoder", "text", "latents")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "_run", _in_process)
        precompute.precompute(
            PrecomputeLatents(
                data=found["data"], autoencoder_from=found["autoencoder"], out=found["latents"], batch_size=BATCH,
                device="cpu", text_encoder=TextEncoderConfig(source=text),
            )
        )  # fmt: skip
    return found


def stage_of(*overrides: str) -> DiffusionStage:
    config = compose.load("train", Train, [*SETTINGS, *overrides])
    return DiffusionStage(
        Worker(config=config, run="r", out="o", rank=0, world=1, device=torch.device("cpu"), attempt="a")
    )


class Steps:
    """Whole steps of a stage, as the loop takes them."""

    def __init__(self, stage: DiffusionStage) -> None:
        self.stage, self.ema = stage, EMA(stage.engine, half_life_samples=1000)
        self.batches, self.samples = stage.batches(0, N // BATCH), 0

    def __call__(self) -> None:
        for micro in self.stage.micro_batches(next(self.batches), BATCH):
            self.stage.step(micro, self.samples)
        self.ema.update(BATCH)
        self.samples += BATCH


def parts_of(stored: DiffusionStage, online: DiffusionStage) -> dict[str, Callable[[], object]]:
    """The bare parts of a step: the denoiser under its engine, the autoencoder, the text encoder."""
    engine, source = stored.engine, online.source
    latent = torch.randn(BATCH, 4, SIZE // AUTOENCODER.downsampling, SIZE // AUTOENCODER.downsampling)
    t, context = torch.randint(0, 1000, (BATCH,)), torch.randn(BATCH, TEXT.max_tokens, TEXT.width)
    pixels, captions = torch.zeros(BATCH, 3, SIZE, SIZE), [caption(i) for i in range(BATCH)]

    forgetful = CaptionEmbedder(source.embedder.encoder, torch.float16, cached_bytes=1)

    def denoise() -> None:
        engine.backward(engine(latent, t, context).square().mean())
        engine.step()

    return {
        "denoiser": denoise,
        "autoencoder": lambda: encode(source.autoencoder, pixels, batch_size=BATCH, dtype=torch.float32),
        "text": lambda: forgetful.embed(captions),
    }


def data_wait(root: Path, latents: str) -> dict[str, float]:
    """The loop's own figures of a whole run: the share of its time that it waited for data, and seconds a step."""
    launch.train(compose.load("train", Train, [*SETTINGS, f"latents={latents}", f"out={root / 'run'}", "run=wait"]))
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if names.TRAIN_DATA_WAIT_SHARE in line][1:]
    shares, rates = (
        [line[name] for line in told] for name in (names.TRAIN_DATA_WAIT_SHARE, names.TRAIN_SAMPLES_PER_SECOND)
    )
    return {"data_wait_share": statistics.median(shares), "step": BATCH / statistics.median(rates)}


def steps(made: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of each kind of step and part, in each round."""
    stored = stage_of(f"latents={made['latents']}")
    online = stage_of(
        f"data={made['data']}", "online.enabled=true", f"autoencoder_from={made['autoencoder']}",
        f"online.text_encoder={made['text']}",
    )  # fmt: skip
    calls = {"stored": Steps(stored), "online": Steps(online)} | parts_of(stored, online)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = sys.argv[2]
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *_args, **_kwargs: None  # DeepSpeed keeps the first
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    inputs = write_inputs(folder)
    print(json.dumps(steps(inputs) | data_wait(folder, inputs["latents"])))
