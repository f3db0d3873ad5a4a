"""A model folder and its evaluation report, small and real."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from latentray.checkpoint import manifest
from latentray.registry.report import EvaluationReport, FeatureNetworkId, SamplerSettings

GOOD = {
    "heldout_loss": 0.1,
    "heldout_loss.t500": 0.08,
    "fid": 10.0,
    "kid": -0.001,
    "samples.color_accuracy": 0.95,
    "samples.background_accuracy": 1.0,
    "samples.shape_accuracy": 0.8,
    "samples.heldout_color_accuracy": 0.8,
}


@pytest.fixture
def make_model(tmp_path):
    def make(name="model", *, seed=0, extra=()):
        folder = tmp_path / f"{name}.files"
        (folder / "text_encoder").mkdir(parents=True)
        weights = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
        for part in ("denoiser", "autoencoder", "text_encoder/model"):
            save_file({"weight": weights}, folder / f"{part}.safetensors")
        (folder / "config.json").write_text(json.dumps({"format": 1, "size": 64}))
        (folder / "text_encoder" / "tokenizer.json").write_text("{}")
        for file, content in dict(extra).items():
            (folder / file).write_bytes(content)
        uri = str(tmp_path / name)
        inputs = {"dataset": "d" * 64, "autoencoder": "a" * 64}
        return uri, manifest.publish(folder, uri, kind="model", inputs=inputs)

    return make


@pytest.fixture
def make_report():
    def make(model="m" * 64, metrics=GOOD, **changes):
        network = FeatureNetworkId(name="net", digest="f" * 64, resize="bicubic")
        fields = dict(
            model=model,
            dataset="d" * 64,
            feature_network=network,
            samples=216,
            seed=0,
            sampler=SamplerSettings(sampler="ddim", steps=20, guidance_scale=3.0),
            metrics=dict(metrics),
        )
        return EvaluationReport(**(fields | changes))

    return make
