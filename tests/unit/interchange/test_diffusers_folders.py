"""Whole pipelines from diffusers' folders and back: every bit, published forms of file, and one error for what is wrong."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch

from latentray.conditioning.text import Reading
from latentray.errors import ArtifactError, ConfigError, DigestMismatch, InputMissing
from latentray.inference import model_folder
from latentray.inference.model_folder import SamplingDefaults
from latentray.inference.sampling import TextToImage
from latentray.interchange import diffusers_folders, encoders, folders, layouts, model_folders

NAMES = ("sd1", "inpainting", "sd2", "sdxl", "sdxl_refiner", "sd3")
PARTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
DEFAULTS = {
    name: SamplingDefaults(sampler="flow_euler" if name == "sd3" else "ddim", steps=5, guidance_scale=3.0)
    for name in NAMES
}


@pytest.fixture(scope="module")
def there_and_back(pipeline_folder, tmp_path_factory):
    """name -> (the pipeline read, the model folder, diffusers' folder written from it)."""
    root, made = tmp_path_factory.mktemp("back"), {}

    def go(name):
        if name not in made:
            pipeline = diffusers_folders.from_diffusers(str(pipeline_folder(name)))
            uri = str(root / name / "model")
            model_folders.write(pipeline, uri, defaults=DEFAULTS[name], config={}, meta={})
            (root / name / "scratch").mkdir()
            _, again, defaults = model_folders.read(uri, root / name / "scratch")
            (root / name / "written").mkdir()
            diffusers_folders.write(again, root / name / "written", sampler=defaults.sampler)
            made[name] = pipeline, uri, root / name / "written"
        return made[name]

    return go


def copied(pipeline_folder, name, tmp_path):
    return shutil.copytree(pipeline_folder(name), tmp_path / name)


def edit(path, **changes):
    found = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (found | changes).items() if value != "absent"}))


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_changes_no_bit(name, pipeline_folder, there_and_back):
    theirs, back = pipeline_folder(name), there_and_back(name)[2]
    compared = 0
    for part in PARTS:
        assert (theirs / part).is_dir() == (back / part).is_dir()
        if not (theirs / part).is_dir():
            continue
        before, after = folders.read_weights(theirs / part), folders.read_weights(back / part)
        if part.startswith("text_encoder"):
            kind = "t5" if part.endswith("3") else "clip_projection" if "text_projection.weight" in before else "clip"
            before = encoders.canonical({}, before, kind)[1]
        assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
        assert all(torch.equal(after[key], value) for key, value in before.items())
        compared += len(before)
    assert compared > 100


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_says_the_same_pipeline(name, there_and_back):
    pipeline, _, back = there_and_back(name)
    again = diffusers_folders.from_diffusers(str(back))
    for field in ("layout", "denoiser", "autoencoder", "scale", "objective", "size", "zero_when_empty"):
        assert getattr(again, field) == getattr(pipeline, field)
    for one, other in zip(again.encoders, pipeline.encoders, strict=True):
        assert (one.name, one.reading, one.described) == (other.name, other.reading, other.described)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_is_what_the_pipeline_is(name, there_and_back):
    pipeline = there_and_back(name)[0]
    assert pipeline.size == 32
    assert pipeline.objective.prediction == {"sd2": "v", "sd3": "flow"}.get(name, "epsilon")
    assert [one.name for one in pipeline.encoders] == {
        "sd1": ["clip"], "inpainting": ["clip"], "sd2": ["clip"], "sdxl": ["clip", "open_clip"], "sdxl_refiner": ["open_clip"],
        "sd3": ["clip", "open_clip", "t5"],
    }[name]  # fmt: skip
    assert pipeline.denoiser.combine == {"sdxl": "sdxl", "sd3": "sd3"}.get(name, "one")
    assert pipeline.denoiser.size_numbers == {"sdxl": 6, "sdxl_refiner": 5}.get(name, 0)
    assert (pipeline.scale.shift, pipeline.scale.scale) == {
        "sd1": (0.0, 0.18215), "inpainting": (0.0, 0.18215), "sd2": (0.0, 0.18215), "sd3": (0.0609, 1.5305),
    }.get(name, (0.0, 0.13025))  # fmt: skip


def test_a_model_that_paints_into_pictures_is_one_here_and_there(there_and_back):
    pipeline, uri, back = there_and_back("inpainting")
    assert pipeline.paints
    assert TextToImage(model_folder.load(uri), device="cpu").takes_mask
    assert json.loads((back / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize(("said", "zero"), [(True, True), (False, False), ("absent", True)])
def test_whether_zeros_stand_for_a_missing_negative_prompt_comes_and_goes(said, zero, pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, "sdxl", tmp_path)
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=said)
    pipeline = diffusers_folders.from_diffusers(str(folder))
    assert pipeline.zero_when_empty is zero
    uri = str(tmp_path / "model")
    model_folders.write(pipeline, uri, defaults=DEFAULTS["sdxl"], config={}, meta={})
    assert model_folder.load(uri).zero_when_empty is zero
    for name in ("scratch", "written"):
        (tmp_path / name).mkdir()
    diffusers_folders.write(model_folders.read(uri, tmp_path / "scratch")[1], tmp_path / "written", sampler="ddim")
    index = json.loads((tmp_path / "written" / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is zero


@pytest.mark.parametrize("name", ["sd1", "sd2", "inpainting", "sd3"])
def test_pipelines_that_know_no_zeros_embed_the_empty_caption(name, there_and_back):
    pipeline, uri, back = there_and_back(name)
    assert not pipeline.zero_when_empty and not model_folder.load(uri).zero_when_empty
    assert "force_zeros_for_empty_prompt" not in json.loads((back / "model_index.json").read_text())


def test_half_precision_stays_half(pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, "sd1", tmp_path)
    for path in sorted(folder.rglob("*.safetensors")):
        state = {key: value.half() for key, value in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(state, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
        path.unlink()
    pipeline = diffusers_folders.from_diffusers(str(folder))  # the only variant there is
    uri = str(tmp_path / "model")
    model_folders.write(pipeline, uri, defaults=DEFAULTS["sd1"], config={}, meta={})
    (tmp_path / "scratch").mkdir()
    (tmp_path / "written").mkdir()
    diffusers_folders.write(model_folders.read(uri, tmp_path / "scratch")[1], tmp_path / "written", sampler="ddim")
    for part in ("unet", "vae", "text_encoder"):
        before = folders.read_weights(folder / part, variant="fp16")
        after = folders.read_weights(tmp_path / "written" / part)
        assert all(value.dtype == torch.float16 for value in after.values())
        assert {torch.sum(v.double()).item() for v in before.values()} == {
            torch.sum(v.double()).item() for v in after.values()
        }


def test_weights_in_several_files_are_read(pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, "sd1", tmp_path)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    path.unlink()
    names = [f"diffusion_pytorch_model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    keys = sorted(state)
    halves = dict(zip(names, (keys[::2], keys[1::2]), strict=True))
    for name, half in halves.items():
        safetensors.torch.save_file({key: state[key] for key in half}, folder / "unet" / name)
    places = {key: name for name, half in halves.items() for key in half}
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole = diffusers_folders.from_diffusers(str(pipeline_folder("sd1"))).denoiser_state
    found = diffusers_folders.from_diffusers(str(folder)).denoiser_state
    assert all(torch.equal(found[key], value) for key, value in whole.items())
    index.write_text(json.dumps({"weight_map": places | {"conv_in.gain": names[0]}}))
    with pytest.raises(ArtifactError, match=r"conv_in.gain is in no file"):
        diffusers_folders.from_diffusers(str(folder))
    (folder / "unet" / names[1]).unlink()
    with pytest.raises(InputMissing) as caught:
        diffusers_folders.from_diffusers(str(folder))
    assert caught.value.where.endswith(names[1])


@pytest.mark.parametrize(
    ("name", "part", "changes", "where"),
    [
        ("sd1", "model_index.json", {"_class_name": "FluxPipeline"}, "model_index.json"),
        ("sd1", "model_index.json", {"_class_name": "absent"}, "model_index.json"),
        ("sd3", "model_index.json", {"text_encoder_3": [None, None]}, "model_index.json"),
        ("sd1", "model_index.json", {"unet": "absent"}, "model_index.json"),
        ("sd1", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("sd1", "unet/config.json", {"_class_name": "UNetMotionModel"}, "unet/config.json"),
        ("sd1", "unet/config.json", {"in_channels": 8}, "denoiser.in_channels"),
        ("sd1", "unet/config.json", {"cross_attention_dim": 80}, "denoiser.context_width"),
        ("sdxl", "text_encoder_2/config.json", {"projection_dim": 40}, "denoiser.pooled_width"),
        ("sd3", "text_encoder_3/config.json", {"d_model": 192}, "denoiser.context_width"),
        ("sd1", "vae/config.json", {"_class_name": "AutoencoderTiny"}, "vae/config.json"),
        ("sd1", "scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "_class_name"),
        ("sd1", "scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end"),
    ],
)
def test_what_cannot_be_said_here_is_refused_by_its_name(name, part, changes, where, pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, name, tmp_path)
    edit(folder / part, **changes)
    with pytest.raises(ConfigError) as caught:
        diffusers_folders.from_diffusers(str(folder))
    assert caught.value.where.endswith(where)
    assert caught.value.mend


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("unet", {"block_out_channels": [32, 96]}, r"is \(64, 32, 3, 3\), wanted \(96, 32, 3, 3\); \d+ more differ"),
        ("vae", {"block_out_channels": [32, 64]}, r"is \(32,.*wanted \(64,.*more differ"),
        ("text_encoder", {"intermediate_size": 64}, r"fc1.weight is \(96, 64\), wanted \(64, 64\); 8 more differ"),
        ("text_encoder", {"num_hidden_layers": 4}, r"layers.3.*is missing, wanted \(64, 64\); 15 more differ"),
    ],
)
def test_weights_of_another_shape_name_the_first_both_shapes_and_how_many_more(
    part, changes, says, pipeline_folder, tmp_path
):
    folder = copied(pipeline_folder, "sd1", tmp_path)
    edit(folder / part / "config.json", **changes)
    with pytest.raises(ArtifactError, match=says):
        diffusers_folders.from_diffusers(str(folder))


def test_an_encoder_of_another_kind_is_refused(pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, "sd1", tmp_path)
    edit(folder / "text_encoder" / "config.json", model_type="t5")
    with pytest.raises(ArtifactError, match="is a t5"):
        diffusers_folders.from_diffusers(str(folder))


def test_a_pickle_is_refused_by_name_with_its_mend(pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, "sd1", tmp_path)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError) as caught:
        diffusers_folders.from_diffusers(str(folder))
    assert caught.value.where.endswith("vae/diffusion_pytorch_model.bin")
    assert "safetensors" in caught.value.mend


def test_a_folder_without_a_part_or_an_index_is_refused(pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, "sd1", tmp_path)
    shutil.rmtree(folder / "vae")
    with pytest.raises(InputMissing, match="not there"):
        diffusers_folders.from_diffusers(str(folder))
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ArtifactError, match="no JSON"):
        diffusers_folders.from_diffusers(str(folder))
    (folder / "model_index.json").unlink()
    with pytest.raises(InputMissing, match=r"no model_index.json"):
        diffusers_folders.from_diffusers(str(folder))
    with pytest.raises(InputMissing, match="no such folder"):
        diffusers_folders.from_diffusers(str(tmp_path / "nowhere"))


def test_a_tokenizer_that_knows_more_than_the_encoder_embeds_is_refused_before_anything_is_written(
    pipeline_folder, tmp_path
):
    folder = copied(pipeline_folder, "sd1", tmp_path)
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    found = json.loads(tokenizer.read_text())
    found["added_tokens"].append(found["added_tokens"][0] | {"id": 999, "content": "<new>"})
    tokenizer.write_text(json.dumps(found))
    pipeline = diffusers_folders.from_diffusers(str(folder))
    with pytest.raises(ArtifactError, match="The tokenizer knows"):
        model_folders.write(pipeline, str(tmp_path / "model"), defaults=DEFAULTS["sd1"], config={}, meta={})
    assert not (tmp_path / "model").exists()


def test_a_flipped_bit_of_the_model_is_refused_by_name(there_and_back, tmp_path):
    copy = shutil.copytree(there_and_back("sd1")[1], tmp_path / "model")
    path = copy / "text_encoders" / "clip" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(DigestMismatch) as caught:
        model_folders.read(str(copy), tmp_path / "scratch")
    assert caught.value.where.endswith("clip/model.safetensors")


@pytest.mark.parametrize(
    ("name", "changes", "where"),
    [
        ("sd1", {"classes": 10}, "denoiser.classes"),
        ("sdxl", {"size_numbers": 4}, "denoiser.size_numbers"),
        ("sd1", {"combine": "sequence"}, "denoiser.combine"),
        ("sdxl", {"combine": "one"}, "denoiser.combine"),
        ("sd1", {"pooled_width": 48}, "denoiser.pooled_width"),
        ("sd1", {"family": "video"}, "denoiser.family"),
    ],
)
def test_a_model_that_is_no_pipeline_of_diffusers_is_refused_by_our_setting(name, changes, where, there_and_back):
    pipeline = there_and_back(name)[0]
    config = dataclasses.replace(pipeline.denoiser, **changes)
    with pytest.raises(ConfigError) as caught:
        layouts.of_model(config, [one.reading for one in pipeline.encoders])
    assert caught.value.where == where
    with pytest.raises(ConfigError) as caught:
        layouts.of_model(pipeline.denoiser, [Reading(kind="clip", layer=2)] * 3)
    assert caught.value.where == "text_encoders"
