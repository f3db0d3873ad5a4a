"""The video U-Net: exactly its image U-Net until it is trained, a network over time afterwards."""

import dataclasses

import pytest
import torch

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models import temporal
from latentray.models.unet import UNet
from latentray.models.video import VideoUNet, is_temporal

TINY = DenoiserConfig(
    family="video", channels=[8, 16], blocks=1, depth=[1, 1], heads=2, context_width=6, groups=4, pooled_width=5,
    size_numbers=6, size_width=4, linear_projection=True,
)  # fmt: skip
IMAGE = dataclasses.replace(TINY, family="unet")


def video(config: DenoiserConfig = TINY, *, trained: bool = False) -> VideoUNet:
    """A fresh network, or one whose layers over time are no longer the identity."""
    net = build.seeded(lambda: VideoUNet(config), 0)
    if trained:
        torch.manual_seed(1)
        for name, parameter in net.named_parameters():
            if is_temporal(name):
                parameter.data = torch.randn_like(parameter) * 0.2
    return net


def given(clips: int, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Clips, noise levels, text, and what else the network reads."""
    generator = torch.Generator().manual_seed(clips * 100 + frames)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    t = torch.linspace(1.0, 900.0, clips)
    return randn(clips, frames, 4, 6, 4), t, randn(clips, 3, 6), {"pooled": randn(clips, 5), "size": randn(clips, 6)}


def of_each_frame(frames: int, *told: torch.Tensor) -> list[torch.Tensor]:
    return [one.repeat_interleave(frames, 0) for one in told]


def test_it_begins_with_the_image_networks_own_weights_under_their_names():
    net, image = video().state_dict(), build.seeded(lambda: UNet(IMAGE), 0).state_dict()
    assert [name for name in net if not is_temporal(name)] == list(image)
    assert all(torch.equal(net[name], image[name]) for name in image)
    assert sum(map(is_temporal, net)) > 0


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frames", [1, 2, 7, 16])
def test_with_fresh_temporal_layers_every_frame_is_the_image_networks_bit_for_bit(frames, grad):
    net, image = video(), build.seeded(lambda: UNet(IMAGE), 0)
    x, t, context, told = given(3, frames)
    with torch.set_grad_enabled(grad):
        y = net(x, t, context, **told)
        t_N, context_N, *rest = of_each_frame(frames, t, context, *told.values())
        expected = image(x.flatten(0, 1), t_N, context_N, **dict(zip(told, rest, strict=True)))
        assert torch.equal(y, expected.unflatten(0, (3, frames)))
        alone = image(x[1, :1], t[1:2], context[1:2], **{name: value[1:2] for name, value in told.items()})
    torch.testing.assert_close(y[1, :1], alone)


def test_with_fresh_temporal_layers_the_image_networks_gradients_are_unchanged():
    net, image = video(), build.seeded(lambda: UNet(IMAGE), 0)
    x, t, context, told = given(2, 4)
    net(x, t, context, **told).square().sum().backward()
    t_N, context_N, *rest = of_each_frame(4, t, context, *told.values())
    image(x.flatten(0, 1), t_N, context_N, **dict(zip(told, rest, strict=True))).square().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(torch.equal(gradients[name], p.grad) for name, p in image.named_parameters())
    moving = {name for name, gradient in gradients.items() if is_temporal(name) and gradient.any()}
    assert moving == {
        name for name in gradients if is_temporal(name) and (".proj_out." in name or ".conv2." in name)
    }, "only what begins as zero can learn at the first step; the rest follows"


@pytest.mark.parametrize(("attention", "convolution"), [(True, False), (False, True), (True, True)])
def test_trained_layers_carry_information_across_frames_and_never_across_clips(attention, convolution):
    config = dataclasses.replace(TINY, temporal_attention=attention, temporal_convolution=convolution)
    net = video(config, trained=True).eval()
    x, t, context, told = given(2, 5)
    moved = x.clone()
    moved[1, 4] += 1
    with torch.no_grad():
        before, after = net(x, t, context, **told), net(moved, t, context, **told)
    assert not torch.allclose(before[1, 0], after[1, 0], atol=1e-5) or not attention
    assert not torch.allclose(before[1, 3], after[1, 3], atol=1e-5)
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=1e-6)


def test_clips_of_a_batch_can_change_places():
    net = video(trained=True).eval()
    x, t, context, told = given(3, 4)
    positions, order = torch.tensor([[0, 1, 2, 3], [0, 2, 4, 6], [5, 6, 7, 8]]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        y = net(x, t, context, **told, positions=positions)
        moved = {name: value[order] for name, value in told.items()}
        other = net(x[order], t[order], context[order], **moved, positions=positions[order])
    torch.testing.assert_close(y[order], other)


def test_attention_tells_frames_apart_by_their_positions_alone():
    """Without a convolution a clip is a set of frames at positions: both in another order give the other order's clip."""
    net = video(dataclasses.replace(TINY, temporal_convolution=False), trained=True).eval()
    x, t, context, told = given(2, 6)
    positions, order = torch.arange(6).expand(2, -1), torch.tensor([3, 1, 5, 0, 4, 2])
    with torch.no_grad():
        y = net(x, t, context, **told)
        torch.testing.assert_close(net(x, t, context, **told, positions=positions), y, rtol=0, atol=0)
        torch.testing.assert_close(net(x[:, order], t, context, **told, positions=positions[:, order]), y[:, order])
        assert not torch.allclose(net(x, t, context, **told, positions=2 * positions), y, atol=1e-4)


def test_every_parameter_gets_a_gradient():
    net = video(trained=True)
    x, t, context, told = given(2, 3)
    net(x, t, context, **told).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_frozen_spatial_layers_get_none_and_those_over_time_the_same():
    free, frozen = video(trained=True), video(dataclasses.replace(TINY, train_only_temporal=True), trained=True)
    x, t, context, told = given(2, 3)
    for net in (free, frozen):
        net(x, t, context, **told).square().mean().backward()
    wanted = {name: p.grad for name, p in free.named_parameters()}
    for name, p in frozen.named_parameters():
        assert p.requires_grad == is_temporal(name)
        if is_temporal(name):
            torch.testing.assert_close(p.grad, wanted[name])
        else:
            assert p.grad is None


def test_checkpointed_activations_change_no_gradient():
    nets = [video(dataclasses.replace(TINY, checkpoint_activations=one), trained=True) for one in (False, True)]
    x, t, context, told = given(2, 3)
    for net in nets:
        net(x, t, context, **told).square().mean().backward()
    for (name, plain), again in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(plain.grad, again.grad), name


def test_memory_layout_changes_nothing():
    net = video(trained=True).eval()
    x, t, context, told = given(2, 3)
    with torch.no_grad():
        y = net(x, t, context, **told)
        torch.testing.assert_close(net.to(memory_format=torch.channels_last)(x, t, context, **told), y)


def test_pixels_beyond_what_one_attention_takes_are_attended_to_in_parts(monkeypatch):
    net = video(trained=True).eval()
    x, t, context, told = given(2, 3)
    with torch.no_grad():
        y = net(x, t, context, **told)
        monkeypatch.setattr(temporal, "_SEQUENCES", 5)
        torch.testing.assert_close(net(x, t, context, **told), y)


def test_a_picture_is_refused_by_name():
    x, t, context, told = given(2, 3)
    with pytest.raises(ConfigError) as caught:
        video()(x[:, 0], t, context, **told)
    assert caught.value.where == "frames"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"temporal_heads": 3}, "denoiser.temporal_heads"),
        ({"temporal_heads": 0}, "denoiser.temporal_heads"),
        ({"temporal_attention": False, "temporal_convolution": False}, "denoiser.temporal_convolution"),
        ({"temporal_convolution": False, "depth": [0, 0], "middle_depth": 0}, "denoiser.temporal_convolution"),
        ({"channels": [8, 15], "groups": 1, "heads": 1}, "denoiser.channels"),
        ({"channels": [8, 18]}, "denoiser.channels"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, where):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(TINY, **changes)
    assert caught.value.where == where
    assert caught.value.mend
