"""Models that no pipeline of Stable Diffusion is: each refused by its setting, before a file is written."""

import json
import shutil
from pathlib import Path

import pytest

from latentray.checkpoint import manifest
from latentray.config.export import Export
from latentray.errors import ConfigError
from latentray.inference.model_folder import SamplingDefaults
from latentray.interchange import diffusers_folders, exporting, model_folders

POLICY = {
    "denoiser.family": "policy", "denoiser.context_width": None, "denoiser.observation_width": 3, "policy": {},
    "autoencoder": "absent", "text_encoders": "absent",
}  # fmt: skip
FLOW = {"objective.schedule": "flow", "objective.prediction": "flow"}
DISCRETE = {"objective.schedule": "linear", "objective.prediction": "v", "objective.timestep_draw": "uniform"}
REFUSED = [
    ("sd1", {"denoiser.family": "video", "frames": 4, "fps": 2.0}, "denoiser.family"),
    ("sd1", POLICY, "denoiser.family"),
    ("sd1", {"denoiser.classes": 10}, "denoiser.classes"),
    ("sd1", {"denoiser.context_width": None}, "denoiser.context_width"),
    ("sd1", {"denoiser.context_layers": 2, "denoiser.context_vocabulary": 300}, "denoiser.context_layers"),
    ("sdxl", {"denoiser.size_numbers": 4}, "denoiser.size_numbers"),
    ("sd1", {"denoiser.combine": "sequence"}, "denoiser.combine"),
    ("sd1", {"denoiser.pooled_width": 48}, "denoiser.pooled_width"),
    ("sd1", {"text_encoders.0.kind": "clip_vision"}, "text_encoders"),
    ("sd1", {"text_encoders.0.kind": "tokens"}, "text_encoders"),
    ("sdxl", {"text_encoders.1.layer": 1}, "text_encoders"),
    ("sd1", {"autoencoder.kind": "vq", "autoencoder.codebook_size": 16}, "autoencoder.kind"),
    ("sd1", {"autoencoder.kind": "identity", "autoencoder.latent_channels": 3}, "autoencoder.kind"),
    ("sd1", {"autoencoder.patch": 2}, "autoencoder.patch"),
    ("sd1", {"objective.learned_variance": True, "denoiser.out_channels": 8}, "objective.learned_variance"),
    ("sd1", {"objective.schedule": "ve", "objective.prediction": "edm"}, "objective.schedule"),
    ("sd1", {"objective.schedule": "unnoised", "objective.prediction": "x0"}, "objective.schedule"),
    ("sd1", {"denoiser.in_channels": 7}, "beside.kind"),
    ("sd1", {"denoiser.in_channels": 6}, "denoiser.in_channels"),
    ("sdxl_refiner", {"denoiser.in_channels": 9}, "beside.kind"),
    ("sd1", {"zero_when_empty": True}, "stage.zero_when_dropped"),
]
ONLY_DIFFUSERS = [
    ("sd3", {"denoiser.in_channels": 33}, "beside.kind"),
    ("sd3", {"zero_when_empty": True}, "stage.zero_when_dropped"),
    ("sdxl", FLOW | {"sampling.sampler": "flow_euler"}, "sampler"),
    ("sd3", DISCRETE | {"sampling.sampler": "euler"}, "sampler"),
]
ONLY_SINGLE_FILE = [
    ("sd3", {}, "to"),
    ("sdxl_refiner", {"zero_when_empty": True}, "stage.zero_when_dropped"),
    ("sd1", {"autoencoder.attention": False}, "autoencoder.attention"),
    ("sd1", {"autoencoder.quant_convolutions": False}, "autoencoder.quant_convolutions"),
    ("sd1", {"objective.schedule": "cosine"}, "objective.schedule"),
    ("sdxl", FLOW, "objective.schedule"),
]


@pytest.fixture(scope="module")
def model(pipeline_folder, tmp_path_factory):
    """name -> a model folder with its weights, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(name: str) -> Path:
        if name not in made:
            defaults = SamplingDefaults(sampler="flow_euler" if name == "sd3" else "ddim", steps=3, guidance_scale=3.0)
            pipeline = diffusers_folders.from_diffusers(str(pipeline_folder(name)))
            model_folders.write(pipeline, str(root / name), defaults=defaults, config={}, meta={})
            made[name] = root / name
        return made[name]

    return folder


def changed(folder: Path, changes: dict, to: Path) -> str:
    """The same model with another configuration, under a manifest of its own."""
    files = shutil.copytree(folder, to / "files")
    (files / "manifest.json").unlink()
    config = json.loads((files / "config.json").read_text())
    for place, value in changes.items():
        *parents, last = place.split(".")
        within = config
        for key in parents:
            within = within[int(key)] if isinstance(within, list) else within[key]
        if value == "absent":
            del within[last]
        else:
            within[last] = value
    (files / "config.json").write_text(json.dumps(config))
    manifest.publish(files, str(to / "model"), kind="model")
    return str(to / "model")


@pytest.mark.parametrize(
    ("to", "name", "changes", "where"),
    [
        *(("diffusers", *one) for one in [*REFUSED, *ONLY_DIFFUSERS]),
        *(("single_file", *one) for one in [*REFUSED, *ONLY_SINGLE_FILE]),
    ],
)
def test_it_is_refused_by_the_setting_and_nothing_is_written(to, name, changes, where, model, tmp_path):
    uri = changed(model(name), changes, tmp_path)
    with pytest.raises(ConfigError) as caught:
        exporting.export(Export(model=uri, to=to, out=f"{tmp_path}/out"))
    assert caught.value.where == where
    assert caught.value.mend
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sd1", "inpainting", "sdxl", "sdxl_refiner", "sd3"])
def test_a_model_that_nothing_was_changed_of_is_handed_out(name, model, tmp_path):
    """So that what is refused is the setting, not the folder."""
    exporting.export(Export(model=changed(model(name), {}, tmp_path), to="diffusers", out=f"{tmp_path}/out"))
    assert (tmp_path / "out" / "model_index.json").is_file()
