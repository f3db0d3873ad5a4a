"""One step of stage 1: whose gradient goes where, and that the surrogate is the sum of the losses."""

import types

import pytest
import torch
import torch.distributed as dist

from latentray.config import compose
from latentray.config.train import Train
from latentray.models.discriminator import adaptive_weight, generator_hinge
from latentray.training import stage1
from latentray.training.state import Worker


class PlainEngine:
    """The engine's interface without DeepSpeed: plain autograd, no optimizer."""

    dtype = torch.float32

    def __init__(self, module, config, **_kwargs):
        self.module, self.steps = module, 0

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.steps += 1
        return True


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def stage(group, tiny, inputs, monkeypatch, request):
    monkeypatch.setattr(stage1, "Engine", PlainEngine)
    overrides = [*tiny.STAGE1, f"data={inputs['data']}", *getattr(request, "param", [])]
    config = compose.load("train", Train, overrides)
    worker = Worker(config=config, run="r", out="o", rank=0, world=1, device=torch.device("cpu"), attempt="a")
    return stage1.AutoencoderStage(worker)


def gradients(engine) -> list[torch.Tensor | None]:
    return [p.grad for p in engine.module.parameters()]


def batch_of(stage):
    return next(stage.batches(0, 1))


LPIPS = ["stage.lpips.weight=1", "stage.lpips.net=alex", "stage.lpips.random_backbone=true"]


@pytest.mark.parametrize("stage", [[], LPIPS], indirect=True, ids=["plain", "lpips"])
def test_neither_network_gets_the_others_gradient(stage, monkeypatch):
    seen = {}
    critic_step = stage._critic_step

    def between(x, rec, weight_B, metrics):
        seen["critic"] = gradients(stage.discriminator)
        seen["autoencoder"] = [g.clone() for g in gradients(stage.engine)]
        critic_step(x, rec, weight_B, metrics)

    monkeypatch.setattr(stage, "_critic_step", between)
    metrics = stage.step(batch_of(stage), samples=0)
    assert all(g is None for g in seen["critic"])
    assert all(g is not None and g.any() for g in gradients(stage.discriminator))
    assert all(torch.equal(a, b) for a, b in zip(seen["autoencoder"], gradients(stage.engine), strict=True))
    assert (stage.engine.steps, stage.discriminator.steps) == (1, 1)
    assert all(torch.isfinite(value).all() and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("stage", [[], ["autoencoder.attention=true"], LPIPS], indirect=True)
def test_the_surrogate_has_the_gradient_of_the_sum_of_the_losses(stage, tiny):
    config, batch = stage.worker.config, batch_of(stage)
    metrics = stage.step(batch, samples=0)
    got = [p.grad.clone() for p in stage.engine.module.parameters()]

    net, critic = stage.engine.module, stage.discriminator.module
    net.zero_grad()
    keys = stage1.randomness.keys_of(config.seed, stage1.Purpose.POSTERIOR, batch.ids)
    noise = stage1.randomness.normal(keys, (config.autoencoder.latent_channels, tiny.SIZE // 8, tiny.SIZE // 8))
    rec, mean, logvar, _ = net(batch.x_BCHW, noise)
    kl = stage1.Posterior(mean_BChw=mean, logvar_BChw=logvar).kl().mean()
    reconstruction = stage._reconstruction(rec, batch.x_BCHW, torch.ones(len(rec)), 0, {})
    adversarial = generator_hinge(critic(rec), torch.ones(len(rec)))
    last = net.decoder.conv_out.weight
    at_last = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    weight = adaptive_weight(*at_last)
    total = (
        reconstruction + config.stage.kl_weight * kl + config.stage.discriminator.weight * weight.detach() * adversarial
    )
    expected = torch.autograd.grad(total, list(net.parameters()))
    assert float(metrics["autoencoder/adaptive_weight"]) == pytest.approx(float(weight), rel=1e-3)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("stage", [LPIPS], indirect=True)
def test_a_damaged_sample_leaves_no_trace(stage):
    def after(pixel):
        for engine in stage.engines.values():
            engine.module.zero_grad()
        batch = batch_of(stage)
        batch.weight_B[1] = 0.0
        batch.x_BCHW[1] = pixel
        metrics = stage.step(batch, samples=0)
        return metrics, [p.grad.clone() for e in stage.engines.values() for p in e.module.parameters()]

    (one, grads), (other, others) = after(0.0), after(0.7)
    assert float(one["train/loss"]) == pytest.approx(float(other["train/loss"]), rel=1e-6)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("stage", [["stage.discriminator.start_samples=100"]], indirect=True)
def test_the_discriminator_waits_for_its_start(stage):
    stage.step(batch_of(stage), samples=99)
    assert stage.discriminator.steps == 0
    assert all(g is None for g in gradients(stage.discriminator))
    stage.step(batch_of(stage), samples=100)
    assert stage.discriminator.steps == 1


@pytest.mark.parametrize("stage", [LPIPS], indirect=True)
def test_a_random_lpips_backbone_is_told(stage, capsys):
    assert stage.facts["lpips_backbone"]["source"] == "random"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_adaptive_weight_does_not_depend_on_the_number_of_workers(stage, monkeypatch, world):
    """Equal shares on every worker: the sum over workers must be a mean before its norm meets the constant 1e-4."""
    x = batch_of(stage).x_BCHW
    stage.worker = types.SimpleNamespace(config=stage.worker.config, world=world, device=torch.device("cpu"))
    monkeypatch.setattr(stage1.dist, "all_reduce", lambda t, *a, **k: t.mul_(world))
    rec, *_, features = stage.engine.module(x)
    metrics = {}
    stage._adversarial(rec, x, torch.ones(len(x)), features, 0, metrics)
    monkeypatch.setattr(stage1.dist, "all_reduce", lambda t, *a, **k: t)
    stage.worker = types.SimpleNamespace(config=stage.worker.config, world=1, device=torch.device("cpu"))
    alone = {}
    stage._adversarial(rec, x, torch.ones(len(x)), features, 0, alone)
    name = "autoencoder/adaptive_weight"
    assert float(metrics[name]) == pytest.approx(float(alone[name]), rel=1e-6)
