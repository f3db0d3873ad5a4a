"""Sampling in less memory: the same pictures, each part on the device for its turn alone, and how much the largest need."""

import contextlib
import gc

import pytest
import torch

from latentray import build
from latentray.conditioning.text import Reading, TextEncoder
from latentray.config import compose
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.objective import ObjectiveConfig
from latentray.config.train import Train
from latentray.inference import model_folder
from latentray.inference.placement import Placement
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.models.tiling import decode_in_strips
from latentray.planning.meter import Meter, default_dtype, stand_ins

GB = 1e9


def request(**changes) -> SamplingRequest:
    values = dict(prompt="a red circle", steps=4, guidance_scale=2.0, seed=1, sampler="ddim", height=16, width=16)
    return SamplingRequest(**(values | changes))


def test_the_pictures_are_the_same(load, write_model):
    whole = load(ObjectiveConfig(prediction="v"))
    model = model_folder.load(write_model(ObjectiveConfig(prediction="v")))
    parts = TextToImage(model, device="cpu", dtype=torch.float32, offload=True)
    requests = [request(), request(seed=2)]
    for one, other in zip(whole.sample(requests), parts.sample(requests), strict=True):
        difference = abs(one.pixels_HWC.astype(int) - other.pixels_HWC.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # strips add in another order


def test_a_part_is_on_the_device_for_its_turn_alone():
    """The meta device stands for a GPU: what is moved there is seen to be there."""
    moves = []

    class Watched(torch.nn.Linear):
        def to(self, device):
            moves.append(str(device))
            return self

    part = Watched(2, 2)
    placement = Placement(torch.device("meta"), offload=True)
    placement.place(part)
    with contextlib.suppress(ZeroDivisionError), placement.at_work(part):
        moves.append("works")
        raise ZeroDivisionError
    assert moves == ["cpu", "meta", "works", "cpu"]


def _bytes(*modules: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for m in modules for p in [*m.parameters(), *m.buffers()])


def _peak(call, *modules: torch.nn.Module) -> int:
    """Bytes of weights and of the most that lives beside them."""
    gc.collect()
    meter = Meter([*(p for m in modules for p in m.parameters()), *(b for m in modules for b in m.buffers())])
    with meter, torch.inference_mode():
        call()
    return _bytes(*modules) + meter.peak


def _clip(hidden: int, layers: int, heads: int, *, projection: bool) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=hidden,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _encoded(model: torch.nn.Module, prompts: int) -> None:
    class Tokenizer:
        def __call__(self, texts, **_):
            return {
                "input_ids": torch.zeros(len(texts), 77, dtype=torch.long, device="cpu"),
                "attention_mask": torch.ones(len(texts), 77, dtype=torch.long, device="cpu"),
            }

    encoder = TextEncoder(
        model=model, tokenizer=Tokenizer(), name="clip", reading=Reading(), fingerprint="", digest="", folder=None
    )
    encoder.model(input_ids=Tokenizer()(["a"] * prompts)["input_ids"].to("meta"))


@pytest.mark.parametrize(
    ("denoiser", "size", "encoders", "limit_gb", "offload"),
    [
        ("unet_sd15", 512, [(768, 12, 12, False)], 4, False),
        ("unet_sdxl", 1024, [(768, 12, 12, False), (1280, 32, 20, True)], 8, True),
    ],
)
def test_the_largest_fit_where_they_should(denoiser, size, encoders, limit_gb, offload, capsys):
    """Counted on tensors without contents: weights in bf16, text encoders in fp32, both passes of guidance in one batch."""
    config = compose.load("train", Train, [f"denoiser={denoiser}", "latents=l", "cluster=none"]).denoiser
    side = size // 8
    with stand_ins(gpu=True):
        texts = [_clip(*one[:3], projection=one[3]) for one in encoders]
        with default_dtype(torch.bfloat16):
            net, autoencoder = build.denoiser(config), build.autoencoder(AutoencoderConfig())

            def step():
                x = torch.empty(2, 4, side, side)
                told = {"pooled": torch.empty(2, 1280), "size": torch.empty(2, 6)} if config.pooled_width else {}
                net(x, torch.empty(2), torch.empty(2, 77, config.context_width), **told)

            def decode():
                latent = torch.empty(1, 4, side, side)
                decode_in_strips(autoencoder, latent) if offload else autoencoder.decode(latent)

            turns = {
                "text encoders": _peak(lambda: [_encoded(one, 2) for one in texts], *texts),
                "denoiser": _peak(step, net),
                "autoencoder": _peak(decode, autoencoder),
            }
            weights = [_bytes(*texts), _bytes(net), _bytes(autoencoder)]
    needed = list(turns.values())
    if not offload:  # the others' weights are there too
        needed = [peak + sum(weights) - own for peak, own in zip(needed, weights, strict=True)]
    told = ", ".join(f"{name} {peak / GB:.2f}" for name, peak in zip(turns, needed, strict=True))
    with capsys.disabled():
        print(f"\n{denoiser} at {size}, {'offload' if offload else 'all at once'}: GB {told}")
    assert max(needed) <= limit_gb * GB
    assert min(weights) > 0.1 * GB
