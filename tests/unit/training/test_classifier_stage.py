"""The classifier's stage: its loss and accuracies on one step, what it sees, and what is refused before a worker starts."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from latentray.config import compose
from latentray.config.objective import ObjectiveConfig
from latentray.config.train import Train
from latentray.diffusion import schedules
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.tracking import names
from latentray.training import classifier_stage, stage2, telemetry
from latentray.training import inputs as checks
from latentray.training.state import Worker

CLASSES = ["circle", "square", "triangle"]


class PlainEngine:
    """The engine's interface without DeepSpeed: plain autograd, no optimizer."""

    dtype = torch.float32

    def __init__(self, module, config, **_kwargs):
        self.module = module

    def __call__(self, *args):
        self.seen = args
        return self.module(*args)

    def backward(self, loss):
        loss.backward()

    def step(self):
        return True


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def labelled(tiny, inputs, tmp_path_factory) -> dict[str, str]:
    """`data` with labels and `latents` of it."""
    root = tmp_path_factory.mktemp("labelled")
    data = tiny.write_pictures(root, "train", 24, classes=CLASSES).rpartition("/")[0]
    with pytest.MonkeyPatch.context() as patch:
        return {
            "data": data,
            "latents": tiny.write_latents(root, patch, data=data, autoencoder=inputs["autoencoder"]),
        }


@pytest.fixture(scope="module")
def load(tiny, labelled):
    def made(*overrides: str, latents: str | None = None) -> Train:
        plain = [one for one in tiny.SMALL if not one.startswith("denoiser")]
        own = ["stage=classifier", "denoiser=classifier_tiny", "denoiser.classes=3"]
        own.append(f"latents={latents or labelled['latents']}")
        return compose.load("train", Train, [*plain, *own, *overrides])

    return made


def worker(config: Train, out: str = "o") -> Worker:
    return Worker(config=config, run="r", out=out, rank=0, world=1, device=torch.device("cpu"), attempt="a")


def first(stage) -> stage2.MicroBatch:
    return next(stage.micro_batches(next(stage.batches(0, 1)), 8))


def test_a_step_is_the_cross_entropy_of_noisy_latents(load, monkeypatch):
    monkeypatch.setattr(stage2, "Engine", PlainEngine)
    stage = classifier_stage.ClassifierStage(worker(load()))
    assert list(stage.engines) == ["classifier"] and stage.inputs.keys() == {"latents"}
    micro = first(stage)
    micro.latents.weight_B[1] = 0.0  # it was damaged, and keeps its place
    metrics = stage.step(micro, 0)
    x, t = stage.engine.seen
    labels = micro.latents.given.labels_B
    assert sorted(labels.unique().tolist()) == [0, 1, 2]
    with torch.no_grad():
        logits = stage.engine.module(x, t)
    each = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(metrics[names.TRAIN_LOSS], (each.sum() - each[1]) / 8)
    assert all(p.grad is not None and p.grad.any() for p in stage.engine.module.parameters())
    hits = [bool(hit) for i, hit in enumerate(logits.argmax(1) == labels) if i != 1]
    assert metrics[names.CLASSIFIER_ACCURACY].tolist() == [sum(hits), 7]
    parts = torch.stack([metrics[names.accuracy_at(third)] for third in ("low", "middle", "high")])
    assert parts.sum(0).tolist() == [sum(hits), 7]
    assert not any(value.requires_grad for value in metrics.values())


def test_it_sees_the_very_noise_that_a_denoiser_is_trained_with(tiny, load, labelled, monkeypatch):
    monkeypatch.setattr(stage2, "Engine", PlainEngine)
    plain = [one for one in tiny.SMALL if not one.startswith("denoiser")]
    denoiser = [*plain, "stage=diffusion", "denoiser=unet_tiny_class", "denoiser.classes=3"]
    denoiser += [f"latents={labelled['latents']}", "objective.offset_noise=0.1"]
    noised = []
    for stage in (
        classifier_stage.ClassifierStage(worker(load("objective.offset_noise=0.1"))),
        stage2.DiffusionStage(worker(compose.load("train", Train, denoiser))),
    ):
        noised.append(stage.noised(first(stage), 0)[1])
    assert torch.equal(noised[0].x_BChw, noised[1].x_BChw) and torch.equal(noised[0].t_B, noised[1].t_B)


def test_accuracies_are_counted_by_thirds_of_the_noise_levels():
    schedule = schedules.build(ObjectiveConfig(timesteps=300))
    t, hit = torch.tensor([0, 99, 100, 250, 299]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    found = classifier_stage.accuracies(schedule, t, hit, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert [found[names.accuracy_at(third)].tolist() for third in ("low", "middle", "high")] == [[1, 2], [1, 1], [1, 1]]
    assert found[names.CLASSIFIER_ACCURACY].tolist() == [3, 4]


def test_a_metric_of_two_numbers_is_logged_as_their_quotient(group, load, tmp_path):
    told = telemetry.Telemetry(worker(load(), str(tmp_path)), facts={}, resumed_at=0)
    two = [
        {"loss": torch.tensor(1.0), "low": torch.tensor([1.0, 4.0]), "high": torch.tensor([0.0, 0.0])},
        {"loss": torch.tensor(4.0), "low": torch.tensor([2.0, 2.0]), "high": torch.tensor([0.0, 0.0])},
    ]
    told.step(two, data_wait=0.1, seconds=1.0)
    logged = told.flush(16, {})
    told.close()
    assert (logged["loss"], logged["low"]) == (2.5, 0.5) and "high" not in logged
    (line,) = [json.loads(one) for one in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["low"] == 0.5 and "high" not in line


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["denoiser.classes=2"], "denoiser.classes"),
        (["denoiser.in_channels=3"], "denoiser.in_channels"),
    ],
)
def test_a_classifier_that_does_not_fit_the_latents_is_refused(load, overrides, where):
    with pytest.raises(ConfigError) as caught:
        checks.check(load(*overrides), 1)
    assert caught.value.where == where


def test_latents_without_labels_or_of_another_autoencoder_are_refused(load, inputs, tiny, tmp_path):
    with pytest.raises(ConfigError, match="no class labels") as caught:
        checks.check(load(latents=inputs["latents"]), 1)
    assert caught.value.where == "denoiser.classes"
    other = tiny.write_autoencoder(str(tmp_path / "other"), seed=5)
    with pytest.raises(FingerprintMismatch):
        checks.check(load(f"autoencoder_from={other}"), 1)


def test_pictures_and_latents_are_taken(load, labelled, inputs):
    assert checks.check(load(), 1).keys() == {"latents", "autoencoder"}
    online = ["latents=null", f"data={labelled['data']}", "online.enabled=true"]
    online.append(f"autoencoder_from={inputs['autoencoder']}")
    assert checks.check(load(*online), 1).keys() == {"dataset", "autoencoder"}
