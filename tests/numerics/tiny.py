"""A data set, an autoencoder, a text encoder and latents so small that a training run takes a second."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from latentray import build
from latentray.checkpoint import manifest
from latentray.conditioning import tiny_text_encoder
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig, TinyTextEncoderConfig
from latentray.data import index, latent_parts, latent_shards, precompute, shards, synthetic
from latentray.data.latent_encoder import Encoder
from latentray.models.autoencoder import KLAutoencoder, LatentScale

N, SIZE = 64, 64
AUTOENCODER = AutoencoderConfig(channels=[16], blocks=1, patch=8, attention=False, groups=4)
TEXT = TinyTextEncoderConfig(width=16, layers=1, heads=2, max_tokens=12, vocabulary=300)

SMALL = [
    "autoencoder=shapes_f8", "autoencoder.channels=[16]", "autoencoder.groups=4",
    "denoiser=unet_shapes", "denoiser.channels=[16,16]", "denoiser.groups=4", "denoiser.head_dim=8",
    "denoiser.context_width=16", "objective=v", "size=64", "global_batch_size=8", "total_samples=48",
    "log_every_samples=8", "checkpoint_every_samples=0", "ema_half_life_samples=64", "precision=fp32",
    "optimizer.lr=0.002", "optimizer.warmup_samples=16", "cluster=none", "tracking=none", "cluster.device=cpu",
]  # fmt: skip
STAGE1 = [
    *SMALL, "stage=autoencoder", "stage.lpips.weight=0", "stage.discriminator.channels=8", "stage.discriminator.layers=1",
    "stage.discriminator.start_samples=0", "stage.kl_weight=0.0001",
]  # fmt: skip
STAGE2 = [
    *SMALL, "stage=diffusion", "stage.caption_dropout=0.3", "stage.latent=draw", "objective.timestep_spread=sobol",
    "objective.offset_noise=0.1",
]  # fmt: skip


def online(inputs: dict[str, str]) -> list[str]:
    """Stage 2 from pictures, encoded by what wrote the latents."""
    return [
        *STAGE2, f"data={inputs['data']}", "online.enabled=true", f"autoencoder_from={inputs['autoencoder']}",
        f"online.text_encoder={inputs['text_encoder']}", "online.batch_size=16", "online.text_dtype=float32",
    ]  # fmt: skip


def beside(inputs: dict[str, str]) -> dict[str, list[str]]:
    """Runs of denoisers that see more than their latent."""
    short = [*online(inputs), "total_samples=24"]
    return {
        "inpainting": [*short, "beside.kind=inpainting", "denoiser.in_channels=9"],
        "larger": [*short, "beside.kind=super_resolution", "beside.factor=8", "denoiser.in_channels=7"],
    }


def write_pictures(
    root: Path, split: str, n: int, per_shard: int = 24, *, classes: Sequence[str] = (), told: str = "shape"
) -> str:
    """Shards of the drawn set, written in this process; the data set's URI. With `classes` their shapes, or what else is `told`,
    are these."""
    folder = root / f"built-{split}"
    folder.mkdir(parents=True)
    values = sorted({getattr(kind, told) for kind in synthetic.KINDS})

    def sample(i: int) -> shards.Sample:
        kind = synthetic.kind_of(split, i)
        buffer = io.BytesIO()
        Image.fromarray(synthetic.draw(kind, 0, i, split=split)).save(buffer, "PNG", compress_level=1)
        caption = synthetic.caption(kind)
        label = {"label": values.index(getattr(kind, told)) % len(classes)} if classes else {}
        about = json.dumps({"captions": [caption], "width": SIZE, "height": SIZE} | label).encode()
        return shards.Sample(
            key=f"{i:09d}",
            members={"png": buffer.getvalue(), "txt": caption.encode(), "json": about},
            columns={"width": SIZE, "height": SIZE} | label,
        )

    cuts = range(0, n, per_shard)
    made = [
        shards.write_shard(map(sample, range(a, min(a + per_shard, n))), folder / shards.shard_name(k))
        for k, a in enumerate(cuts)
    ]
    index.write(made, folder / index.NAME)
    uri = str(root / "data" / split)
    manifest.publish(folder, uri, kind="dataset", meta={"classes": list(classes)} if classes else {})
    return uri


def write_autoencoder(uri: str, *, seed: int = 0, scale: float = 2.0) -> str:
    folder = Path(f"{uri}-built")
    folder.mkdir(parents=True)
    net = build.seeded(lambda: KLAutoencoder(AUTOENCODER), seed)
    build.write_autoencoder(folder, AUTOENCODER, net.state_dict(), scale=LatentScale(shift=0.1, scale=scale), size=SIZE)
    manifest.publish(folder, uri, kind="autoencoder")
    return uri


def write_text_encoder(uri: str) -> str:
    tiny_text_encoder.publish(uri, [synthetic.caption(kind) for kind in synthetic.KINDS], TEXT)
    return uri


ENCODERS = {
    "sdxl": [("clip", "clip", 16, {"layer": 2}), ("open_clip", "clip_projection", 16, {"layer": 2})],
    "sd3": [
        ("clip", "clip_projection", 16, {"layer": 2}),
        ("open_clip", "clip_projection", 16, {"layer": 2}),
        ("t5", "t5", 48, {"max_tokens": 9}),
    ],
    "refiner": [("open_clip", "clip_projection", 16, {"layer": 2})],
    "picture": [("eye", "clip_vision", 16, {})],
    "text_and_picture": [("clip", "clip", 16, {}), ("eye", "clip_vision", 16, {"layer": 2})],
    "learned": [("words", "tokens", 16, {"max_tokens": 10})],
}
"""(name, kind, width, reading) of the encoders that conf/encoders names, as narrow as the tiny denoisers read them."""


def write_encoders(root: Path, family: str) -> list[TextEncoderConfig]:
    """The encoders of a family, random, each in a folder below `root`."""
    return [
        TextEncoderConfig(name=name, kind=kind, source=write_encoder(root / name, kind, width, seed=number), **reading)
        for number, (name, kind, width, reading) in enumerate(ENCODERS[family])
    ]


def listed(one: TextEncoderConfig) -> str:
    """As `online.text_encoders` lists it on a command line."""
    about = {"name": one.name, "source": f"'{one.source}'", "kind": one.kind, "layer": one.layer}
    about["max_tokens"] = one.max_tokens or "null"
    return (
        "{" + ", ".join(f"{key}: {value}" for key, value in sorted(about.items(), key=lambda i: i[0] == "layer")) + "}"
    )


def write_encoder(folder: Path, kind: str, width: int, *, seed: int = 0) -> str:
    """A random encoder of a kind, two layers deep, with the tokenizer that the drawn captions make; its folder."""
    import transformers

    config = dataclasses.replace(TEXT, width=width, layers=2, seed=seed)
    tiny_text_encoder.write(folder, [synthetic.caption(one) for one in synthetic.KINDS], config)
    if kind == "tokens":
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
    if kind in ("clip", "tokens"):
        return str(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 + seed)
        model = _RANDOM[kind](transformers, tokenizer, width)
    model.save_pretrained(folder, safe_serialization=True)
    if kind == "clip_vision":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return str(folder)


PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 24}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 24, "width": 24}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
}  # fmt: skip
"""As CLIP's, of 24 pixels."""


def _clip_vision(transformers, tokenizer, width: int):
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2, image_size=24,
            patch_size=8, projection_dim=width, initializer_factor=10.0,
        )
    )  # fmt: skip


def _clip_projection(transformers, tokenizer, width: int):
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=TEXT.max_tokens, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_factor=10.0,
        )
    )  # fmt: skip


def _t5(transformers, tokenizer, width: int):
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=tokenizer.vocab_size, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


_RANDOM = {"clip_projection": _clip_projection, "t5": _t5, "clip_vision": _clip_vision}


def write_latents(root: Path, monkeypatch, *, data: str, autoencoder: str, text_source: str = "", **more) -> str:
    """The whole precompute job, the stages of its Ray graph one after another in this process; `more` are its settings."""

    def in_process(config, job, work):
        encoder = Encoder(job)
        for one in work:
            names = dict(one.written)
            for part in one.left:
                parcel = latent_parts.Parcel.from_table(latent_parts.read_part(job, part).to_table())
                names[part.number] = latent_shards.write_part(job, encoder.encode(parcel))
            latent_shards.assemble(job, one.split, one.name, [names[number] for number in sorted(names)])
            yield one

    monkeypatch.setattr(precompute, "_run", in_process)
    out = str(root / "latents")
    precompute.precompute(
        PrecomputeLatents(
            data=data, autoencoder_from=autoencoder, out=out, batch_size=16, text_dtype="float32", device="cpu",
            text_encoder=TextEncoderConfig(source=text_source) if text_source else None, **more,
        )
    )  # fmt: skip
    return out


def build_all(root: Path, monkeypatch) -> dict[str, str]:
    """Everything a run of either stage reads: `data`, `autoencoder`, `text_encoder`, `latents`."""
    torch.set_num_threads(1)
    write_pictures(root, "train", N)
    write_pictures(root, "validation", 12)
    found = {
        "data": str(root / "data"),
        "autoencoder": write_autoencoder(str(root / "autoencoder")),
        "text_encoder": write_text_encoder(str(root / "text_encoder")),
    }
    found["latents"] = write_latents(
        root, monkeypatch, data=found["data"], autoencoder=found["autoencoder"], text_source=found["text_encoder"]
    )
    return found
