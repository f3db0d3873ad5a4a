"""What a step takes, counted on stand-ins: against published FLOPs, torch's own hooks and a step that is really run."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from latentray import build
from latentray.config import compose
from latentray.config.train import Train
from latentray.models.autoencoder import Posterior, last_layer_gradient
from latentray.models.discriminator import PatchDiscriminator, discriminator_hinge, generator_hinge
from latentray.planning import memory, workload
from latentray.planning.accelerators import ACCELERATORS
from latentray.planning.workload import Linear


def train(*overrides: str) -> Train:
    return compose.load("train", Train, ["tracking=none", "cluster=none", *overrides])


@pytest.mark.parametrize(("size", "gflop"), [(256, 180.1), (512, 803.3)])
def test_the_u_net_of_sd15_takes_what_is_published(size, gflop):
    found = workload.measure(train("denoiser=unet_sd15", f"size={size}"), gpu=True, text_tokens=77)
    assert found.flops.keys() == {"bf16"}
    assert found.flops["bf16"] == pytest.approx(3 * gflop * 1e9, rel=0.03)  # a backward pass is two forward passes
    assert [net.parameters for net in found.networks] == [859_520_964]


def test_activations_are_the_tensors_that_autograd_saves(tiny):
    config = tiny("precision=fp32")
    found = workload.measure(config, gpu=False, text_tokens=11)
    net = build.denoiser(config.denoiser)
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    for batch in (1, 3, 8):
        saved: dict[int, int] = {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = net(torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.randn(batch, 11, 16))
            y.float().square().mean()
        assert found.activations.at(batch) == pytest.approx(sum(saved.values()), rel=0.02)


def test_checkpointed_activations_are_few_and_cost_a_forward_pass(tiny):
    config = tiny("gpu=h100", "precision=bf16", "denoiser.blocks=3")
    kept = workload.measure(config, gpu=True, text_tokens=11)
    denoiser = dataclasses.replace(config.denoiser, checkpoint_activations=True)
    again = workload.measure(dataclasses.replace(config, denoiser=denoiser), gpu=True, text_tokens=11)
    assert again.activations.per_sample < 0.4 * kept.activations.per_sample
    assert again.peak.per_sample < 0.8 * kept.peak.per_sample
    assert again.flops["bf16"] == pytest.approx(4 / 3 * kept.flops["bf16"], rel=0.06)


def test_gpus_never_form_the_matrix_of_attention(tiny):
    """4096 tokens attend to each other: 64 MiB a head in fp32, where fused attention keeps none of it."""
    config = tiny("size=128", "denoiser.depth=[1,1]", "denoiser.checkpoint_activations=false")
    found = workload.measure(config, gpu=True, text_tokens=11)
    assert found.peak.per_sample < 2 * 4 * 4096**2


def test_autocast_keeps_a_bf16_copy_of_the_weights_and_computes_in_bf16(tiny):
    config = tiny("gpu=h100")
    plain = workload.measure(dataclasses.replace(config, precision="fp32"), gpu=True, text_tokens=11)
    cast = workload.measure(dataclasses.replace(config, precision="autocast"), gpu=True, text_tokens=11)
    assert set(plain.flops) == {"fp32"}
    assert set(cast.flops) == {"bf16"}
    weights = sum(one.parameters for one in cast.networks)
    assert 1.8 * weights < cast.activations.fixed < 2.2 * weights


def test_what_is_encoded_online_counts_and_is_never_trained(tiny):
    stored = workload.measure(tiny(), gpu=True, text_tokens=11)
    online = workload.measure(tiny("online.enabled=true", "data=d"), gpu=True, text_tokens=11)
    assert sum(online.flops.values()) > sum(stored.flops.values())
    assert [(net.name, net.trained) for net in online.networks] == [("denoiser", True), ("autoencoder", False)]


@pytest.mark.parametrize("name", [name for name in compose.groups()["denoiser"] if "tiny" in name])
@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_every_kind_of_denoiser_is_planned_with_what_it_reads(name, precision):
    stage = "classifier" if name.startswith("classifier") else "diffusion"
    config = train(f"stage={stage}", f"denoiser={name}", f"precision={precision}", "size=128")
    found = workload.measure(config, gpu=True, text_tokens=9)
    assert found.networks[0].parameters > 0
    assert found.flops["bf16"] > 0
    assert 0 < found.activations.per_sample <= found.peak.per_sample


def test_buckets_are_planned_at_their_largest(tiny):
    square = workload.measure(tiny("stage=autoencoder", "size=128"), gpu=True, text_tokens=1)
    buckets = tiny("stage=autoencoder", "size=64", "buckets.sizes=[64,128]")
    assert workload.measure(buckets, gpu=True, text_tokens=1) == square


def test_the_terms_of_stage_1_begin_one_after_another(tiny):
    config = tiny("stage=autoencoder", "stage.lpips.weight=1", "stage.lpips.start_samples=1200",
                  "stage.discriminator.start_samples=3600")  # fmt: skip
    found = workload.phases(config)
    assert [(one.share, one.lpips, one.critic) for one in found] == [
        (0.25, False, False), (0.5, True, False), (0.25, True, True),
    ]  # fmt: skip
    never = tiny("stage=autoencoder", "stage.discriminator.weight=0")
    assert [(one.share, one.lpips, one.critic) for one in workload.phases(never)] == [(1.0, False, False)]
    assert len(workload.phases(tiny())) == 1


def test_lpips_computes_in_fp32_beside_a_bf16_autoencoder(tiny):
    config = tiny("stage=autoencoder", "gpu=h100", "precision=bf16", "stage.lpips.weight=1", "stage.lpips.net=alex")
    found = workload.measure(config, gpu=True, text_tokens=1)
    assert min(found.flops.values()) > 0 and set(found.flops) == {"bf16", "fp32"}
    assert {net.name: net.trained for net in found.networks} == {
        "autoencoder": True, "discriminator": True, "LPIPS": False,
    }  # fmt: skip


def test_two_points_make_a_line():
    line = Linear.through({4: 10.0, 8: 18.0})
    assert (line.fixed, line.per_sample, line.at(16)) == (2.0, 2.0, 34.0)


def measured_peak(nets: list[nn.Module], step) -> int:
    """Bytes at the peak of two real steps on this CPU, all tensors of the run; the second has the optimizer's states.

    `step` is given what the tracker wants called before a network is called a second time.
    """
    optimizers = [torch.optim.AdamW(net.parameters()) for net in nets]
    tracker = MemTracker()
    tracker.track_external(*nets, *optimizers)
    with tracker:
        for number in range(2):
            step(tracker.reset_mod_stats)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)  # as DeepSpeed at an accumulation boundary: gradients are there
            if number == 0:
                tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def planned_peak(config, batch: int, text_tokens: int) -> float:
    """The plan's, without what the measurement has not: average, buffers, interpreter."""
    found = workload.measure(config, gpu=False, text_tokens=text_tokens)
    made = memory.memory(found, config, ACCELERATORS["h100"], stage=0, world=1, micro_batch=batch, lazy=True)
    return made.total - made.average - made.buffers - made.reserved


def test_the_planned_peak_of_stage_2_is_that_of_a_real_step(tiny):
    config, batch = tiny("deepspeed=zero0", "size=32", "denoiser.blocks=1"), 3
    net = build.denoiser(config.denoiser)

    def step(called_again):
        y = net(torch.randn(batch, 4, 16, 16), torch.rand(batch), torch.randn(batch, 11, 16))
        (y.float() - torch.randn(batch, 4, 16, 16)).square().flatten(1).mean(1).mean().backward()

    assert planned_peak(config, batch, 11) == pytest.approx(measured_peak([net], step), rel=0.03)


def test_the_planned_peak_of_stage_1_is_that_of_a_real_step(tiny):
    config, batch = tiny("stage=autoencoder", "deepspeed=zero0", "size=32"), 3
    net, critic = build.autoencoder(config.autoencoder), PatchDiscriminator(channels=8, layers=1)
    one = torch.ones(batch)

    def step(called_again):
        x = torch.rand(batch, 3, 32, 32)
        rec, mean, logvar, features = net(x, torch.randn(batch, 4, 16, 16))
        loss = (rec - x).abs().mean() + Posterior(mean_BChw=mean, logvar_BChw=logvar).kl().mean()
        leaf = rec.detach().requires_grad_(True)
        generator_hinge(critic(leaf), one).backward(inputs=[leaf])  # the tracker's hooks refuse autograd.grad
        last_layer_gradient(leaf.grad, features, 1, net.decoder.conv_out.weight.shape)
        (loss + (rec * leaf.grad).sum()).backward()
        called_again()
        real, fake = critic(torch.cat([x, rec.detach()])).chunk(2)
        discriminator_hinge(real, fake, one).backward()

    assert planned_peak(config, batch, 1) == pytest.approx(measured_peak([net, critic], step), rel=0.03)


def test_a_video_denoisers_step_grows_with_its_frames_and_keeps_what_it_does_not_train():
    settings = ["denoiser=video_tiny", "denoiser_from=m"]
    free, frozen = train(*settings), train(*settings, "denoiser.train_only_temporal=true")
    short, long = (workload.measure(free, gpu=True, text_tokens=11, clip_frames=frames) for frames in (4, 8))
    assert long.activations.at(4) == pytest.approx(2 * short.activations.at(4), rel=0.05)
    assert sum(long.flops.values()) > 1.9 * sum(short.flops.values())
    kept = workload.measure(frozen, gpu=True, text_tokens=11, clip_frames=4)
    trained, layers = kept.networks
    assert trained.parameters + layers.parameters == short.networks[0].parameters
    assert not layers.trained and layers.bytes > 0 and kept.activations.at(4) < short.activations.at(4)
