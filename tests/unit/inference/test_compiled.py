"""A compiled denoiser draws the same pictures, alone and in batches, in few graphs; without a compiler it is refused."""

import pytest
import torch

from latentray import build
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ConfigError
from latentray.inference import model_folder
from latentray.inference.sampling import SamplingRequest, TextToImage


@pytest.fixture(scope="module")
def uri(write_model):
    return write_model(ObjectiveConfig(prediction="v"))


def request(**changes) -> SamplingRequest:
    values = dict(prompt="a red circle", steps=3, guidance_scale=2.0, seed=1, sampler="ddim", height=16, width=16)
    return SamplingRequest(**(values | changes))


@pytest.mark.slow
def test_the_pictures_are_the_same(uri):
    eager, compiled = (
        TextToImage(model_folder.load(uri), device="cpu", dtype=torch.float32, compile=way) for way in (False, True)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    batches = (
        [request()],
        [request(), request(seed=2)],
        [request(seed=n) for n in range(5)],
        [request(guidance_scale=1.0)],
    )
    for requests in batches:
        for one, other in zip(eager.sample(requests), compiled.sample(requests), strict=True):
            difference = abs(one.pixels_HWC.astype(int) - other.pixels_HWC.astype(int))
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # of one size, of any, of a single row
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_a_compiler_it_is_refused_before_anything_is_drawn(uri, monkeypatch):
    def refuse() -> None:
        raise ConfigError("No compiler.", where="compile", mend="Install one.")

    monkeypatch.setattr(build, "require_compiler", refuse)
    with pytest.raises(ConfigError) as caught:
        TextToImage.load(uri, device="cpu", compile=True)
    assert caught.value.where == "compile"
    TextToImage.load(uri, device="cpu")
