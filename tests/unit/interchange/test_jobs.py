"""Others' weights in, a model folder; a model or release out, with its card: through the jobs' own calls."""

import json
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from jobs import export as export_job
from latentray import build
from latentray.checkpoint import manifest, store
from latentray.conditioning import text
from latentray.config.export import Export
from latentray.config.import_weights import ImportWeights
from latentray.errors import AlreadyExists, ArtifactError, ConfigError, InputMissing
from latentray.inference import model_folder
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.interchange import diffusers_folders, exporting, folders, importing
from latentray.registry import versions
from latentray.registry.report import EvaluationReport, FeatureNetworkId, SamplerSettings


@pytest.fixture(scope="module")
def model(pipeline_folder, tmp_path_factory):
    """SD 1, imported, with its parts as artifacts."""
    root = tmp_path_factory.mktemp("imported")
    weights = str(pipeline_folder("sd1"))
    importing.import_weights(ImportWeights(weights=weights, out=f"{root}/model", parts=str(root), steps=3))
    return f"{root}/model"


@pytest.fixture(scope="module")
def release(model, tmp_path_factory):
    """(registry, id) of a release of it, under an open licence."""
    registry = str(tmp_path_factory.mktemp("registry"))
    report = EvaluationReport(
        model=manifest.read(model).digest,
        dataset="d" * 64,
        feature_network=FeatureNetworkId(name="net", digest="f" * 64, resize="bicubic"),
        samples=216,
        seed=0,
        sampler=SamplerSettings(sampler="ddim", steps=20, guidance_scale=3.0),
        metrics={"fid": 10.0},
    )
    made = versions.create(model, report, registry, license="apache-2.0")
    versions.move_alias(registry, "production", made)
    return registry, made


def test_an_imported_model_samples_by_its_own_defaults(model, capsys):
    sampler = TextToImage.load(model, device="cpu")
    assert (sampler.defaults.sampler, sampler.defaults.steps, sampler.defaults.guidance_scale) == ("dpmpp_2m", 3, 7.5)
    assert sampler.size == 32
    drawn = sampler.sample(
        [
            SamplingRequest(
                prompt="a red circle", steps=3, guidance_scale=7.5, seed=1, sampler="dpmpp_2m", height=32, width=32
            )
        ]
    )
    assert drawn[0].pixels_HWC.shape == (32, 32, 3)
    made = manifest.read(model, kind="model")
    assert made.meta["layout"] == "sd"
    assert "base_model" not in made.meta  # a folder is no id


def test_its_parts_are_what_training_asks_for(model):
    root = store.parent(model)
    artifact = build.autoencoder_artifact(f"{root}/autoencoder")
    assert (artifact.scale.scale, artifact.size) == (0.18215, 32)
    own = model_folder.load(model)
    assert all(torch.equal(v, own.autoencoder.state_dict()[k]) for k, v in artifact.load().state_dict().items())
    encoder = text.load(f"{root}/text_encoders/clip")
    assert encoder.fingerprint == own.text_encoders[0].fingerprint
    assert torch.equal(
        encoder.embed(["a red circle"]).tokens_BLD, own.text_encoders[0].embed(["a red circle"]).tokens_BLD
    )


def test_what_is_there_is_not_overwritten_and_nothing_is_left_of_a_refused_import(model, pipeline_folder, tmp_path):
    weights = str(pipeline_folder("sd1"))
    with pytest.raises(AlreadyExists):
        importing.import_weights(ImportWeights(weights=weights, out=model))
    with pytest.raises(AlreadyExists):
        importing.import_weights(ImportWeights(weights=weights, out=f"{tmp_path}/model", parts=store.parent(model)))
    with pytest.raises(ConfigError) as caught:
        importing.import_weights(ImportWeights(weights=weights, out=f"{tmp_path}/model", sampler="flow_euler"))
    assert caught.value.where == "sampler"
    with pytest.raises(InputMissing):
        importing.import_weights(ImportWeights(weights=f"{tmp_path}/nowhere", out=f"{tmp_path}/model"))
    assert not list(tmp_path.iterdir())


def test_a_stand_in_for_its_scheduler_is_told(pipeline_folder, tmp_path, capsys):
    importing.import_weights(ImportWeights(weights=str(pipeline_folder("sd1")), out=f"{tmp_path}/model", size=64))
    said = capsys.readouterr().out
    assert "its PNDMScheduler is no sampler here; dpmpp_2m takes its place" in said
    assert "64x64 pixels" in said
    assert f"python -m jobs.sample release={tmp_path}/model" in said


def test_a_release_is_handed_out_with_the_hubs_card(release, tmp_path):
    registry, made = release
    config = Export(
        model="production", registry=registry, to="diffusers", out=f"{tmp_path}/out", base_model="owner/base",
        prompts=["a red circle"], sampler="ddim",
    )  # fmt: skip
    out = export_job.export(config)
    card = ModelCard.load(f"{out}/README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0", "diffusers", "text-to-image",
    )  # fmt: skip
    assert card.data.base_model == "owner/base"
    assert {"stable-diffusion", "text-to-image", "latentray"} <= set(card.data.tags)
    assert yaml.safe_load(card.content.split("---")[1])["widget"] == [{"text": "a red circle"}]
    assert f"release {made}" in card.text
    assert "| `fid` | 10 | lower |" in card.text
    assert "StableDiffusionPipeline.from_pretrained" in card.text
    assert "num_inference_steps=3, guidance_scale=7.5" in card.text
    listing = manifest.read(out, kind="diffusers")
    assert listing.inputs["release"] == manifest.read(versions.release_uri(registry, made)).digest
    assert {"README.md", "model_index.json", "unet/config.json"} <= set(listing.files)
    manifest.fetch_all(out)
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["solver_order"]) == ("DPMSolverMultistepScheduler", 1)


def test_a_model_that_was_not_evaluated_says_so_and_comes_back_bit_for_bit(model, pipeline_folder, tmp_path):
    out = exporting.to_diffusers(model, f"{tmp_path}/out")
    card = ModelCard.load(f"{out}/README.md")
    assert (card.data.license, card.data.license_name) == ("other", "unspecified")
    assert "was not evaluated" in card.text
    theirs, back = pipeline_folder("sd1"), tmp_path / "out"
    for part in ("unet", "vae"):
        before, after = folders.read_weights(theirs / part), folders.read_weights(back / part)
        assert set(before) == set(after)
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_single_file_is_handed_out_and_imported(model, clip_tokenizer, tmp_path):
    out = export_job.export(Export(model=model, to="single_file", out=f"{tmp_path}/my-model"))
    assert sorted(manifest.read(out, kind="single_file").files) == [
        "README.md",
        "my-model.safetensors",
        "my-model.yaml",
    ]
    weights = f"{out}/my-model.safetensors"
    importing.import_weights(ImportWeights(weights=weights, out=f"{tmp_path}/back", tokenizer=str(clip_tokenizer)))
    before, after = (model_folder.load(uri) for uri in (model, f"{tmp_path}/back"))
    assert all(torch.equal(v, after.denoiser.state_dict()[k]) for k, v in before.denoiser.state_dict().items())
    one, other = (m.text_encoders[0].embed(["a red circle on white"]) for m in (before, after))
    assert torch.equal(one.tokens_BLD, other.tokens_BLD)


def test_a_refused_export_leaves_nothing(model, release, tmp_path):
    for config, error in (
        (Export(model=model, to="diffusers", out=f"{tmp_path}/x", sampler="flow_euler"), ConfigError),
        (Export(model=f"{tmp_path}/nowhere", to="diffusers", out=f"{tmp_path}/x"), InputMissing),
        (Export(model=f"{store.parent(model)}/autoencoder", to="diffusers", out=f"{tmp_path}/x"), ArtifactError),
        (Export(model="staging", registry=release[0], to="diffusers", out=f"{tmp_path}/x"), InputMissing),
        (Export(model=model, to="diffusers", out=model), AlreadyExists),
    ):
        with pytest.raises(error):
            export_job.export(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (dict(to="onnx", model="m", out="o"), "to"),
        (dict(to="diffusers", out="o"), "model"),
        (dict(to="diffusers", model="m", run="r", out="o"), "model"),
        (dict(model="m", out="o"), "to"),
        (dict(out="o"), "run"),
        (dict(to="diffusers", model="m"), "out"),
    ],
)
def test_an_export_that_contradicts_itself_names_the_setting(settings, where):
    with pytest.raises(ConfigError) as caught:
        Export(**settings)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (dict(out="o"), "weights"),
        (dict(weights="w"), "out"),
        (dict(weights="w", out="o", prediction="x"), "prediction"),
        (dict(weights="w", out="o", steps=0), "steps"),
        (dict(weights="w", out="o", size=0), "size"),
        (dict(weights="w", out="o", guidance_scale=-1.0), "guidance_scale"),
    ],
)
def test_an_import_that_cannot_be_names_the_setting(settings, where):
    with pytest.raises(ConfigError) as caught:
        ImportWeights(**settings)
    assert caught.value.where == where


def test_a_shift_of_the_latents_is_moved_into_the_weights_where_the_pipeline_knows_a_scale_alone(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    config["autoencoder"]["shift"] = 0.25
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "manifest.json").unlink()
    manifest.publish(copy, tmp_path / "shifted", kind="model")
    out = exporting.to_diffusers(f"{tmp_path}/shifted", f"{tmp_path}/out")
    pipeline = diffusers_folders.from_diffusers(out)
    before = model_folder.load(f"{tmp_path}/shifted")
    after = build.autoencoder(pipeline.autoencoder, pipeline.autoencoder_state)
    picture = torch.rand(1, 3, 32, 32) * 2 - 1
    wanted = before.scale.normalise(before.autoencoder.encode(picture).mean_BChw)
    assert pipeline.scale.shift == 0
    torch.testing.assert_close(pipeline.scale.normalise(after.encode(picture).mean_BChw), wanted, rtol=1e-4, atol=1e-5)
    drawn = before.autoencoder.decode(before.scale.restore(wanted))
    torch.testing.assert_close(after.decode(pipeline.scale.restore(wanted)), drawn, rtol=1e-4, atol=1e-4)


def test_a_native_size_that_the_autoencoder_does_not_divide_is_refused_before_anything_is_written(
    pipeline_folder, tmp_path
):
    factor = diffusers_folders.from_diffusers(str(pipeline_folder("sd1"))).autoencoder.downsampling
    with pytest.raises(ConfigError) as caught:
        importing.import_weights(
            ImportWeights(weights=str(pipeline_folder("sd1")), out=f"{tmp_path}/model", size=8 * factor + 1)
        )
    assert caught.value.where == "size"
    assert f"a multiple of {factor}" in caught.value.mend
    assert not (tmp_path / "model").exists()
