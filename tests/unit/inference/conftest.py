"""A model folder with small random networks, in any parameterization."""

from typing import Any

import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.conditioning import text, tiny_text_encoder
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.config.text_encoder import TinyTextEncoderConfig
from latentray.inference import model_folder
from latentray.inference.sampling import TextToImage
from latentray.models.autoencoder import KLAutoencoder, LatentScale

AUTOENCODER = AutoencoderConfig(channels=[8, 8], blocks=1, groups=4, attention=False)
DENOISER = DenoiserConfig(channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4)
SCALE = LatentScale(shift=0.25, scale=3.0)


@pytest.fixture(scope="session")
def write_model(tmp_path_factory):
    """(objective, seed=1, denoiser, defaults) -> the URI of a published model folder."""
    encoder = tmp_path_factory.mktemp("encoder")
    config = TinyTextEncoderConfig(width=16, layers=1, heads=2, max_tokens=8)
    tiny_text_encoder.write(encoder, ["a red circle", "a blue square"], config)

    def write(
        objective: ObjectiveConfig, *, seed: int = 1, denoiser=DENOISER, sampler="ddim", steps=3, **more: Any
    ) -> str:
        root = tmp_path_factory.mktemp("model")
        weights.save(root / "autoencoder.safetensors", build.seeded(lambda: KLAutoencoder(AUTOENCODER), 0).state_dict())
        (root / "built").mkdir()
        model_folder.write(
            root / "built",
            autoencoder_config=AUTOENCODER,
            autoencoder_weights=root / "autoencoder.safetensors",
            scale=SCALE,
            denoiser_config=denoiser,
            denoiser_state=build.seeded(lambda: build.denoiser(denoiser), seed).state_dict(),
            objective=objective,
            text_encoders=[text.load(str(encoder))],
            defaults=model_folder.SamplingDefaults(sampler=sampler, steps=steps, guidance_scale=2.0),
            size=16,
            **more,
        )
        manifest.publish(root / "built", root / "published", kind="model")
        return str(root / "published")

    return write


@pytest.fixture(scope="session")
def load(write_model):
    """As `write_model`, loaded in float32 on the CPU."""
    return lambda *args, **kwargs: TextToImage(
        model_folder.load(write_model(*args, **kwargs)), device="cpu", dtype=torch.float32
    )
