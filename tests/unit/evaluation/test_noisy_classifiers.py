"""Measuring a classifier of noisy latents: over fixed noise levels, whatever the latents' shapes and the batches."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from latentray import build
from latentray.checkpoint import manifest
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.data import index, shards
from latentray.data.shards import IndexedShards
from latentray.evaluation import noisy_classifiers
from latentray.models.autoencoder import LatentScale

LINEAR = ObjectiveConfig(schedule="linear")
NET = DenoiserConfig(
    family="classifier", channels=[8], blocks=1, depth=[0], middle_depth=0, heads=2, groups=4, context_width=None,
    classes=2, in_channels=1,
)  # fmt: skip


class BySign(nn.Module):
    """Takes the sign of the mean for the class, and is as sure of it as it is told."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(sure))

    def forward(self, x_BChw, t_B):
        mean = x_BChw.flatten(1).mean(1).sign()
        return self.sure * torch.stack([-mean, mean], dim=1)


def samples(count: int, side: int = 8) -> list[tuple[torch.Tensor, int]]:
    return [(torch.full((1, side, side), 2.0 * (i % 2) - 1), i % 2) for i in range(count)]


def test_what_is_plain_without_noise_is_lost_in_it():
    found = noisy_classifiers.measure(BySign(1.0), LINEAR, samples(200), seed=0)
    assert found["accuracy_at_low"] == 1.0
    assert found["accuracy_at_low"] > found["accuracy_at_high"] + 0.2 and found["accuracy_at_high"] > 0.45
    thirds = [found[f"accuracy_at_{third}"] for third in ("low", "middle", "high")]
    assert found["accuracy"] == pytest.approx(sum(thirds) / 3)
    right, wrong = 0.126928, 2.126928  # -log sigmoid(2), -log sigmoid(-2)
    assert found["loss"] == pytest.approx(found["accuracy"] * right + (1 - found["accuracy"]) * wrong, abs=1e-5)


def test_latents_of_several_shapes_are_measured_together():
    mixed = [one for pair in zip(samples(100, 8), samples(100, 4), strict=True) for one in pair]
    found = noisy_classifiers.measure(BySign(0.0), LINEAR, mixed, seed=0)
    assert found["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert noisy_classifiers.measure(BySign(0.0), LINEAR, [], seed=0) == {}


def test_two_networks_see_the_same_noise():
    net = build.seeded(lambda: build.denoiser(NET), 0)
    one, other = (noisy_classifiers.measure(net, LINEAR, samples(70), seed=1) for _ in range(2))
    assert one == other != noisy_classifiers.measure(net, LINEAR, samples(70), seed=2)


def test_labelled_latents_of_a_store_are_read_and_normalised(tmp_path):
    def record(i: int) -> shards.Sample:
        latent = safetensors.torch.save({"mean": torch.full((1, 2, 2), float(i)), "logvar": torch.zeros(1, 2, 2)})
        return shards.Sample(
            key=f"{i:04d}",
            members={"latent.safetensors": latent, "json": json.dumps({}).encode()},
            columns={"label": -1 if i == 2 else i},
        )

    folder = Path(tmp_path) / "built"
    folder.mkdir()
    index.write([shards.write_shard(map(record, range(4)), folder / shards.shard_name(0))], folder / index.NAME)
    manifest.publish(folder, tmp_path / "latents", kind="latents")
    opened = IndexedShards.open(str(tmp_path / "latents"), kind="latents")
    found = noisy_classifiers.stored(opened, LatentScale(shift=1.0, scale=2.0), limit=16)
    assert noisy_classifiers.is_latents(opened)
    assert [(float(x0.mean()), label) for x0, label in found] == [(-2.0, 0), (0.0, 1), (4.0, 3)]
