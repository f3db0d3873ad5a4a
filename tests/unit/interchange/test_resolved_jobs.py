"""The jobs, given what others made in place of a model: what they begin with, and what they make of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import evaluate, precompute_latents, promote, sampling, serve
from jobs import export as export_job
from latentray import build
from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.config.export import Export
from latentray.config.import_weights import ImportWeights
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.promote import Gate, PromoteConfig
from latentray.config.sample import Sample
from latentray.config.serve import ServeConfig
from latentray.config.train import Train
from latentray.errors import ConfigError, InputMissing, LatentrayError, Stopped
from latentray.interchange import diffusers_folders, importing, resolving
from latentray.training import here, launch

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def tiny():
    """The module that writes tiny inputs (shared with tests/numerics)."""
    spec = importlib.util.spec_from_file_location("tiny_inputs", ROOT / "tests" / "numerics" / "tiny.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imported(pipeline_folder, tmp_path_factory) -> Path:
    """`model` and `autoencoder`, as jobs.import_weights makes them of SD 1."""
    root = tmp_path_factory.mktemp("imported")
    importing.import_weights(ImportWeights(weights=str(pipeline_folder("sd1")), out=f"{root}/model", parts=str(root)))
    return root


@pytest.fixture
def training(tiny, pipeline_folder, tmp_path) -> list[str]:
    """Settings of stage 2 on pictures, with SD 1's own network, all but the models it begins with."""
    tiny.write_pictures(tmp_path, "train", 8)
    text = tiny.write_encoder(tmp_path / "text", "clip", 64)
    denoiser = build.as_dict(diffusers_folders.from_diffusers(str(pipeline_folder("sd1"))).denoiser)
    known = compose.compose("train", tiny.STAGE2).denoiser
    return [
        *tiny.STAGE2, *(f"denoiser.{name}={json.dumps(denoiser[name])}" for name in known), "size=32",
        "total_samples=8", "online.enabled=true", "online.batch_size=8", f"online.text_encoder={text}",
        f"data={tmp_path}/data", f"out={tmp_path}/run", "run=one",
    ]  # fmt: skip


def test_a_pipelines_folder_is_drawn_from_as_what_is_imported_of_it(pipeline_folder, imported, hub_cache, tmp_path):
    hub_cache("tiny/sd1", pipeline_folder("sd1"))
    asked = ["prompt=a red circle", "n=2", "steps=3", "seed=7", "device=cpu"]
    drawn = []
    for number, release in enumerate((pipeline_folder("sd1"), "tiny/sd1", imported / "model")):
        path = f"{tmp_path}/{number}.png"
        sampling.draw(compose.load("sample", Sample, [*asked, f"release={release}", f"out={path}"]))
        drawn.append(np.asarray(Image.open(path)))
        assert json.loads(Image.open(path).text["parameters"])["release"] == str(release)
    assert drawn[0].std() > 0
    assert all(np.array_equal(drawn[0], other) for other in drawn[1:])


def test_an_id_that_is_nowhere_ends_a_job_with_the_settings_name(hub_cache, tmp_path):
    with pytest.raises(InputMissing) as caught:
        sampling.draw(Sample(release="tiny/none", prompt="x", out=f"{tmp_path}/x.png"))
    assert caught.value.where == "release=tiny/none"
    with pytest.raises(InputMissing) as caught:
        launch.train(Train(autoencoder_from="tiny/none", out=f"{tmp_path}/run"))
    assert caught.value.where == "autoencoder_from=tiny/none"
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_none_that_others_made(pipeline_folder, imported, tmp_path):
    asked = dict(release=str(imported / "model"), label="1", out=f"{tmp_path}/x.png")
    with pytest.raises(ConfigError, match="A classifier is wanted"):
        sampling.draw(Sample(classifier=str(pipeline_folder("sd1")), **asked))


def test_training_begins_from_a_pipelines_folder(training, pipeline_folder, imported, tmp_path, monkeypatch):
    begun: list[Train] = []  # and no worker, as if the run was stopped at once
    monkeypatch.setattr(here, "train", lambda config, run, out: begun.append(config))
    source = pipeline_folder("sd1")
    config = compose.load("train", Train, [*training, f"autoencoder_from={source}", f"denoiser_from={source}/unet"])
    with pytest.raises(Stopped):
        launch.train(config)
    (found,) = begun
    for uri, name in ((found.autoencoder_from, "autoencoder"), (found.denoiser_from, "model")):
        assert uri.startswith(f"{tmp_path}/run/from/")
        assert manifest.fetch_all(uri)[0].files == manifest.read(imported / name).files
    with pytest.raises(Stopped):  # it goes on with the same
        launch.train(config)
    assert begun[1] == found


def test_a_mistake_in_a_run_leaves_no_copies(training, pipeline_folder, tmp_path):
    config = [*training, f"autoencoder_from={pipeline_folder('sd1')}", "denoiser.in_channels=7"]
    with pytest.raises(ConfigError, match=r"denoiser\.in_channels"):
        launch.train(compose.load("train", Train, config))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_trained_on_from_the_hub_names_repository_and_commit(training, pipeline_folder, hub_cache, tmp_path):
    hub_cache("tiny/sd1", pipeline_folder("sd1"), COMMIT)
    hub_cache("tiny/vae", pipeline_folder("sd1") / "vae", COMMIT)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.train", *training, "autoencoder_from=tiny/vae", "denoiser_from=tiny/sd1"],
        cwd=ROOT, env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub")}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = manifest.read(tmp_path / "run" / "model")
    assert (made.meta["base_model"], made.meta["base_commit"]) == ("tiny/sd1", COMMIT)
    copies = {folder.name.rsplit("-", 1)[0]: folder for folder in (tmp_path / "run" / "from").iterdir()}
    assert set(copies) == {"tiny--sd1", "tiny--vae"}
    assert made.inputs["denoiser"] == manifest.read(copies["tiny--sd1"]).digest
    assert made.inputs["autoencoder"] == manifest.read(copies["tiny--vae"]).digest
    card = export_job.export(Export(model=f"{tmp_path}/run/model", to="diffusers", out=f"{tmp_path}/out"))
    assert "base_model: tiny/sd1" in Path(card, "README.md").read_text()


def test_latents_name_an_autoencoder_that_lies_beside_them(tiny, pipeline_folder, imported, tmp_path, monkeypatch):
    tiny.write_pictures(tmp_path, "train", 8)
    source = str(pipeline_folder("sd1") / "vae")
    asked = PrecomputeLatents(
        data=f"{tmp_path}/data", autoencoder_from=source, out=f"{tmp_path}/latents", sizes=[32], device="cpu"
    )
    given: list[PrecomputeLatents] = []
    monkeypatch.setattr(precompute_latents.precompute, "precompute", given.append)
    precompute_latents.encode(PrecomputeLatents(**vars(asked) | {"estimate": True}))
    assert not (tmp_path / "latents").exists()
    precompute_latents.encode(asked)
    tried, found = (build.autoencoder_artifact(one.autoencoder_from) for one in given)
    assert found.uri.startswith(f"{tmp_path}/latents/from/vae-")
    assert tried.fingerprint == found.fingerprint == build.autoencoder_artifact(f"{imported}/autoencoder").fingerprint


def test_where_there_can_be_no_latents_no_copy_is_left(tiny, pipeline_folder, tmp_path):
    tiny.write_pictures(tmp_path, "train", 8)
    asked = PrecomputeLatents(
        data=f"{tmp_path}/no-data", autoencoder_from=str(pipeline_folder("sd1") / "vae"), out=f"{tmp_path}/latents",
        sizes=[32], device="cpu",
    )  # fmt: skip
    with pytest.raises(LatentrayError):
        precompute_latents.encode(asked)
    assert not (tmp_path / "latents").exists()


def test_a_report_of_what_others_made_lies_below_runs(pipeline_folder, monkeypatch):
    given: list[Evaluate] = []
    monkeypatch.setitem(evaluate.SUITES, "standard", given.append)
    source = str(pipeline_folder("sd1"))
    evaluate.evaluate(Evaluate(model=source, data="d"))
    evaluate.evaluate(Evaluate(model=source, data="d", out="here"))
    evaluate.evaluate(Evaluate(model="runs/a/model", data="d"))
    assert [one.out for one in given] == ["runs/sd1/report", "here", None]
    assert [manifest.read(one.model).kind for one in given[:2]] == ["model"] * 2


def test_what_was_evaluated_can_be_promoted(pipeline_folder, monkeypatch):
    given: list[PromoteConfig] = []
    monkeypatch.setattr(promote.promotion, "promote", given.append)
    promote.promote(PromoteConfig(model=str(pipeline_folder("sd1")), report="r", gates=[Gate(metric="fid")]))
    assert given[0].model == resolving.artifact(str(pipeline_folder("sd1")), "model", setting="model")


def test_others_models_are_handed_out_in_another_layout(pipeline_folder, tmp_path):
    asked = Export(model=str(pipeline_folder("sd1")), to="single_file", out=f"{tmp_path}/file")
    assert manifest.read(export_job.export(asked)).kind == "single_file"


def test_a_service_takes_them_on_a_cluster_of_its_own_alone(pipeline_folder, monkeypatch):
    given: list[ServeConfig] = []
    monkeypatch.setattr(serve.launch, "serve", given.append)
    source = str(pipeline_folder("sd1"))
    serve.serve(ServeConfig(release=source))
    assert manifest.read(given[0].release, kind="model").meta["layout"] == "sd"
    for config, address in ((ServeConfig(release=source, address="auto"), ""), (ServeConfig(release=source), "head:1")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError) as caught:
            serve.serve(config)
        assert caught.value.where == f"release={source}"
        assert f"weights={source}" in caught.value.mend
    serve.serve(ServeConfig(release=given[0].release, address="auto"))
    assert given[1].release == given[0].release
    serve.serve(ServeConfig(registry="s3://models/registry", address="auto"))
    assert given[2] == ServeConfig(registry="s3://models/registry", address="auto")
