"""What others made, and ids on the hub, wherever a setting names a model: made an artifact once, and kept where it is needed."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config.evaluate import Evaluate
from latentray.config.import_weights import ImportWeights
from latentray.config.sample import Sample
from latentray.config.train import Train
from latentray.errors import ArtifactError, ConfigError, FingerprintMismatch, InputMissing
from latentray.inference import model_folder
from latentray.interchange import (
    diffusers_folders,
    encoders,
    exporting,
    folders,
    importing,
    resolving,
    single_file,
)

COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
SOURCES = {"autoencoder_from": "autoencoder", "denoiser_from": "model"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """This node's cache, empty."""
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy_of(pipeline_folder, tmp_path):
    """(name, part) -> a pipeline's folder, or a part's, that a test may change."""

    def copy(name: str = "sd1", part: str = "") -> Path:
        return shutil.copytree(pipeline_folder(name) / part, tmp_path / "copies" / name / part, dirs_exist_ok=True)

    return copy


def model(source, setting: str = "release") -> str:
    return resolving.artifact(str(source), "model", setting=setting)


def autoencoder(source, setting: str = "autoencoder_from") -> str:
    return resolving.artifact(str(source), "autoencoder", setting=setting)


def change(folder: Path, name: str = "diffusion_pytorch_model.safetensors") -> None:
    """Other weights of the same shapes."""
    encoders.save(folder / name, {key: value + 1 for key, value in folders.read_weights(folder).items()})


# ---- what is made


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_a_pipelines_folder_becomes_what_import_weights_makes_of_it(name, pipeline_folder, tmp_path):
    source = str(pipeline_folder(name))
    importing.import_weights(ImportWeights(weights=source, out=f"{tmp_path}/m", parts=str(tmp_path)))
    for uri, wanted, kind in ((model(source), "m", "model"), (autoencoder(source), "autoencoder", "autoencoder")):
        found = manifest.fetch_all(uri, kind=kind)[0]
        assert found.files == manifest.read(tmp_path / wanted).files
        assert found.config == {"weights": source}


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_an_autoencoder_that_lies_alone_encodes_as_diffusers_has_it(name, copy_of):
    folder = copy_of(name, "vae")
    artifact = build.autoencoder_artifact(autoencoder(folder))
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    assert artifact.scale.scale == theirs.config.scaling_factor
    assert artifact.scale.shift == (theirs.config.shift_factor or 0.0)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        ours, wanted = artifact.load().encode(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(ours.mean_BChw, wanted.mean, atol=1e-4, rtol=1e-4)


def test_the_shift_of_an_sd3_pipeline_comes_along(pipeline_folder):
    assert build.autoencoder_artifact(autoencoder(pipeline_folder("sd3"))).scale.shift == 0.0609


def test_a_vq_autoencoder_that_lies_alone(tmp_path):
    theirs = diffusers.VQModel(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, num_vq_embeddings=16, norm_num_groups=32,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "vq")
    artifact = build.autoencoder_artifact(autoencoder(tmp_path / "vq"))
    x = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(artifact.load().encode(x).mean_BChw, theirs.encode(x).latents, atol=1e-4, rtol=1e-4)


def test_the_autoencoder_of_a_pipeline_that_is_not_exchanged(copy_of):
    folder = copy_of("sd3")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "FluxPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "transformer")
    assert build.autoencoder_artifact(autoencoder(folder)).scale.shift == 0.0609
    with pytest.raises(ConfigError, match="FluxPipeline"):
        model(folder)


def test_a_pipelines_denoiser_stands_for_the_model_it_belongs_to(pipeline_folder):
    assert model(pipeline_folder("sd1") / "unet", "denoiser_from") == model(pipeline_folder("sd1"))
    with pytest.raises(ConfigError, match="AutoencoderKL alone"):
        model(pipeline_folder("sd1") / "vae")


def test_what_was_handed_out_in_diffusers_layout_is_read_again(pipeline_folder, tmp_path):
    out = exporting.to_diffusers(str(pipeline_folder("sd1")), f"{tmp_path}/out")
    assert manifest.read(out).kind == "diffusers"
    assert model_folder.load(model(out)).digest == manifest.read(model(out)).digest


def test_a_single_file_is_a_model(pipeline_folder, clip_tokenizer, tmp_path, hub_cache):
    hub_cache("openai/clip-vit-large-patch14", clip_tokenizer)
    path = tmp_path / "sd1.safetensors"
    single_file.write(diffusers_folders.from_diffusers(str(pipeline_folder("sd1"))), path)
    assert manifest.read(model(path)).meta["layout"] == "sd"
    with pytest.raises(ConfigError, match="single file") as caught:
        autoencoder(path)
    assert "parts=" in caught.value.mend


def test_a_folder_in_an_object_store_and_what_takes_its_place(pipeline_folder, copy_of, moto_s3):
    def upload(folder: Path) -> str:
        for name in store.list_files(folder):
            store.upload(folder / name, moto_s3.uri("vae", name))
        return moto_s3.uri("vae")

    first = autoencoder(upload(pipeline_folder("sd1") / "vae"))
    folder = copy_of("sd1", "vae")
    half = {key: value.half() for key, value in folders.read_weights(folder).items()}
    encoders.save(folder / "diffusion_pytorch_model.safetensors", half)
    second = autoencoder(upload(folder))
    assert manifest.read(first).files != manifest.read(second).files


# ---- once


def test_it_is_made_once_and_anew_where_the_weights_are_others(copy_of, capsys):
    folder = copy_of()
    first = autoencoder(folder)
    made = Path(first, manifest.NAME).stat().st_mtime_ns
    assert autoencoder(folder) == first
    assert Path(first, manifest.NAME).stat().st_mtime_ns == made
    assert capsys.readouterr().out.count("was made an artifact") == 1
    change(folder / "vae")
    assert autoencoder(folder) != first


def test_several_at_once_make_it_once(pipeline_folder, capsys, cache):
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(autoencoder, [pipeline_folder("sd1")] * 4))
    assert len(made) == 1
    assert capsys.readouterr().out.count("was made an artifact") == 1
    assert not list(cache.rglob(".partial-*"))


@pytest.mark.parametrize("name", ["autoencoder.safetensors", "config.json", manifest.NAME])
def test_what_was_cut_short_is_made_again(name, pipeline_folder):
    uri = autoencoder(pipeline_folder("sd1"))
    path = Path(uri, name)
    path.write_bytes(path.read_bytes()[:-9])
    left = path.parents[1] / f".partial-{path.parent.name}-killed"
    left.mkdir()
    assert autoencoder(pipeline_folder("sd1")) == uri
    manifest.fetch_all(uri, kind="autoencoder")
    assert not left.exists()


def test_a_conversion_that_fails_leaves_nothing(copy_of, cache):
    folder = copy_of("sd1", "vae")
    state = folders.read_weights(folder)
    state.pop("encoder.conv_in.weight")
    encoders.save(folder / "diffusion_pytorch_model.safetensors", state)
    with pytest.raises(ArtifactError, match=r"encoder\.conv_in\.weight"):
        autoencoder(folder)
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


# ---- the hub


def test_ids_on_the_hub_name_repository_and_commit(pipeline_folder, hub_cache):
    hub_cache("tiny/sd1", pipeline_folder("sd1"), COMMIT)
    uri = model("tiny/sd1")
    found = manifest.read(uri, kind="model")
    assert (found.meta["base_model"], found.meta["base_commit"]) == ("tiny/sd1", COMMIT)
    assert found.meta["imported_from"] == f"tiny/sd1@{COMMIT}"
    assert f"tiny--sd1@{COMMIT}" in uri
    assert model(f"tiny/sd1@{COMMIT}") == uri
    assert found.files == manifest.read(model(pipeline_folder("sd1"))).files
    hub_cache("tiny/vae", pipeline_folder("sd1") / "vae", COMMIT)
    assert manifest.read(autoencoder("tiny/vae")).meta["base_model"] == "tiny/vae"
    assert manifest.read(autoencoder("tiny/sd1"), kind="autoencoder").files["autoencoder.safetensors"].size


def test_a_later_commit_is_another_artifact(pipeline_folder, copy_of, hub_cache):
    hub_cache("tiny/vae", pipeline_folder("sd1") / "vae", COMMIT)
    first = autoencoder("tiny/vae")
    folder = copy_of("sd1", "vae")
    change(folder)
    hub_cache("tiny/vae", folder, LATER)
    assert autoencoder("tiny/vae") != first
    assert autoencoder(f"tiny/vae@{COMMIT}") == first


def test_an_artifact_of_ours_may_be_on_the_hub(pipeline_folder, tmp_path, hub_cache):
    importing.import_weights(
        ImportWeights(weights=str(pipeline_folder("sd1")), out=f"{tmp_path}/m", parts=str(tmp_path))
    )
    hub_cache("mine/model", tmp_path / "m")
    hub_cache("mine/autoencoder", tmp_path / "autoencoder")
    assert model_folder.load(model("mine/model")).digest == manifest.read(tmp_path / "m").digest
    assert build.autoencoder_artifact(autoencoder("mine/autoencoder")).scale.scale == 0.18215


def test_of_a_repository_only_what_is_wanted_is_fetched():
    names = [
        "README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json",
        "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    ]  # fmt: skip
    weights = [name for name in resolving._chosen(names, "autoencoder") if name.endswith((".safetensors", ".bin"))]
    assert weights == ["vae/diffusion_pytorch_model.safetensors"]
    with pytest.raises(ConfigError, match="pickle"):
        resolving._chosen(names, "model")
    alone = ["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "other.safetensors"]
    assert resolving._chosen(alone, "autoencoder") == ["config.json", "diffusion_pytorch_model.safetensors"]
    ours = [".gitattributes", "manifest.json", "config.json", "denoiser.safetensors", "samples.png", "x.bin"]
    assert resolving._chosen(ours, "model") == ["manifest.json", "config.json", "denoiser.safetensors", "samples.png"]


# ---- what is refused, and what passes


@pytest.mark.parametrize("setting", ["autoencoder_from", "release"])
def test_an_id_that_is_nowhere_names_the_setting(setting, hub_cache, pipeline_folder):
    hub_cache("tiny/sd1", pipeline_folder("sd1"), COMMIT)
    for source in ("tiny/none", "tiny/sd1@v2", "tiny/sd1/other.safetensors"):
        with pytest.raises(InputMissing, match="the hub did not give it") as caught:
            model(source, setting)
        assert caught.value.where == f"{setting}={source}"


def test_a_repository_that_holds_something_else(hub_cache, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    hub_cache("tiny/bert", tmp_path / "bert")
    with pytest.raises(InputMissing, match="neither a pipeline") as caught:
        autoencoder("tiny/bert")
    assert caught.value.where == "autoencoder_from=tiny/bert"


@pytest.mark.parametrize(
    ("part", "name", "kind", "words"),
    [
        ("unet", None, "model", "UNet2DConditionModel alone"),
        ("vae", None, "model", "AutoencoderKL alone"),
        ("unet", None, "autoencoder", "UNet2DConditionModel"),
        ("vae", "AutoencoderTiny", "autoencoder", "AutoencoderTiny"),
        ("vae", None, "classifier", "A classifier is wanted"),
    ],
)
def test_what_is_no_such_model_is_refused_by_name(part, name, kind, words, copy_of):
    folder = copy_of("sd1", part)
    if name is not None:
        described = json.loads((folder / "config.json").read_text()) | {"_class_name": name}
        (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=words):
        resolving.artifact(str(folder), kind, setting="x")


def test_pickled_weights_are_refused(copy_of):
    folder = copy_of("sd1", "vae")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickle"):
        autoencoder(folder)


def test_what_is_ours_and_what_is_nothing_pass_as_they_are(tmp_path, cache):
    (tmp_path / "cut-short").mkdir()
    (tmp_path / "cut-short" / "config.json").write_text("{}")
    manifest.publish(tmp_path / "cut-short", tmp_path / "ours", kind="autoencoder")
    for source in ("identity", "production", "/nowhere", "runs/a/model", f"{tmp_path}/ours", f"{tmp_path}/cut-short"):
        assert autoencoder(source) == source
    config = Train(autoencoder_from=f"{tmp_path}/ours")
    assert resolving.resolved(config, SOURCES, beside=f"{tmp_path}/run") is config
    assert not cache.exists()
    assert not (tmp_path / "run").exists()


def test_settings_are_replaced_and_others_stay(pipeline_folder):
    source = str(pipeline_folder("sd1"))
    found = resolving.resolved(Evaluate(model=source, data="d"), {"model": "model", "baseline": "model"})
    assert found == Evaluate(model=model(source), data="d")
    assert resolving.resolved(Sample(release="r", prompt="x"), {"release": "model"}).release == "r"


# ---- beside a job's output


@pytest.fixture
def begun(copy_of, tmp_path):
    """(settings, output, resolved settings, kept settings) of a run that begins from a pipeline's folder."""
    folder, out = copy_of(), f"{tmp_path}/run"
    config = Train(autoencoder_from=str(folder))
    found = resolving.resolved(config, SOURCES, beside=out)
    return config, out, found, resolving.kept(found, SOURCES, of=config, beside=out)


def test_what_was_made_is_copied_beside_the_output(begun, cache):
    config, out, found, kept = begun
    assert found.autoencoder_from.startswith(str(cache))
    assert kept.autoencoder_from.startswith(f"{out}/from/sd1-")
    copied, _ = manifest.fetch_all(kept.autoencoder_from, kind="autoencoder")
    assert copied == manifest.read(found.autoencoder_from)
    assert kept == resolving.kept(found, SOURCES, of=config, beside=out)  # again, as another rank does


def test_a_run_goes_on_with_its_copy_when_cache_and_source_are_gone(begun, cache):
    config, out, _, kept = begun
    shutil.rmtree(cache)
    shutil.rmtree(config.autoencoder_from)
    assert resolving.resolved(config, SOURCES, beside=out) == kept


def test_a_folder_that_was_changed_since_is_refused(begun):
    config, out, _, kept = begun
    change(Path(config.autoencoder_from) / "vae")
    with pytest.raises(FingerprintMismatch) as caught:
        resolving.resolved(config, SOURCES, beside=out)
    assert kept.autoencoder_from in caught.value.mend


def test_a_run_goes_on_with_the_commit_it_began_with(pipeline_folder, copy_of, hub_cache, moto_s3):
    hub_cache("tiny/vae", pipeline_folder("sd1") / "vae", COMMIT)
    config, out = Train(autoencoder_from="tiny/vae"), moto_s3.uri("run")
    kept = resolving.kept(resolving.resolved(config, SOURCES, beside=out), SOURCES, of=config, beside=out)
    assert kept.autoencoder_from.startswith(f"{out}/from/tiny--vae-")
    folder = copy_of("sd1", "vae")
    change(folder)
    hub_cache("tiny/vae", folder, LATER)
    assert resolving.resolved(config, SOURCES, beside=out) == kept
    assert manifest.read(kept.autoencoder_from).meta["base_commit"] == COMMIT
    assert build.autoencoder_artifact(kept.autoencoder_from).load()
