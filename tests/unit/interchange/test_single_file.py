"""Single files of CompVis' layout both ways: every bit, what YAML and file say, and one error for what is wrong."""

import dataclasses
import pickle

import pytest
import safetensors.torch
import torch
import yaml

from latentray.checkpoint import compvis_names
from latentray.checkpoint.interop_autoencoders import to_diffusers_kl
from latentray.checkpoint.interop_denoisers import to_diffusers_unet
from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import schedules
from latentray.errors import ArtifactError, ConfigError, InputMissing
from latentray.interchange import compvis_yaml, diffusers_folders, single_file
from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
from diffusers import UNet2DConditionModel  # noqa: E402  (it imports torchvision)
from diffusers.loaders import single_file_utils as theirs  # noqa: E402

NAMES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def pipelines(pipeline_folder):
    return {name: diffusers_folders.from_diffusers(str(pipeline_folder(name))) for name in NAMES}


@pytest.fixture(scope="module")
def files(pipelines, tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name, pipeline in pipelines.items():
        single_file.write(pipeline, root / f"{name}.safetensors")
    return root


@pytest.fixture
def read(clip_tokenizer):
    return lambda path, **settings: single_file.from_single_file(path, tokenizer=str(clip_tokenizer), **settings)


def states(pipeline):
    yield pipeline.denoiser_state
    yield pipeline.autoencoder_state
    yield from (one.state for one in pipeline.encoders)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_changes_no_bit(name, pipelines, files, read):
    before, after = pipelines[name], read(files / f"{name}.safetensors")
    for field in ("layout", "denoiser", "autoencoder", "scale", "objective", "zero_when_empty"):
        assert getattr(after, field) == getattr(before, field)
    for one, other in zip(states(before), states(after), strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(other[key], value) for key, value in one.items())
    decides = ("hidden_size", "num_attention_heads", "num_hidden_layers", "hidden_act", "max_position_embeddings")
    for one, other in zip(before.encoders, after.encoders, strict=True):
        assert [one.described[field] for field in decides] == [other.described[field] for field in decides]
        assert (one.name, one.reading) == (other.name, other.reading)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_reads_the_same_networks_from_the_yaml(name, pipelines, files):
    told, pipeline = yaml.safe_load((files / f"{name}.yaml").read_text()), pipelines[name]
    state = safetensors.torch.load_file(files / f"{name}.safetensors")
    described, weights = to_diffusers_unet(pipeline.denoiser, pipeline.denoiser_state)
    found = theirs.create_unet_diffusers_config_from_ldm(told, state)
    by_published_widths = ("class_embed_type", "addition_embed_type", "addition_time_embed_dim", "sample_size")
    found = {key: value for key, value in found.items() if key not in by_published_widths}
    with torch.device("meta"):
        nets = [UNet2DConditionModel(**one) for one in (described, described | found)]
    wanted, rebuilt = ({key: value.shape for key, value in net.state_dict().items()} for net in nets)
    assert rebuilt == wanted
    heads = [[module.heads for module in net.modules() if hasattr(module, "heads")] for net in nets]
    assert heads[0] == heads[1]  # shapes do not tell them
    converted = theirs.convert_ldm_unet_checkpoint(dict(state), described)
    assert set(converted) == set(weights)
    assert all(torch.equal(converted[key], value) for key, value in weights.items())
    described, weights = to_diffusers_kl(
        pipeline.autoencoder, pipeline.autoencoder_state, shift=0.0, scale=pipeline.scale.scale, size=pipeline.size
    )
    found = theirs.create_vae_diffusers_config_from_ldm(told, state)
    assert {key: described[key] for key in found if key != "sample_size"} == {
        key: value for key, value in found.items() if key != "sample_size"
    }
    converted = theirs.convert_ldm_vae_checkpoint(dict(state), described)
    assert all(torch.equal(converted[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sd1", ["cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"]),
        ("sd2", ["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"]),  # the fourth is never run
        (
            "sdxl",
            [
                "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
                "conditioner.embedders.1.model.text_projection",
                f"{UNET}label_emb.0.0.weight",
            ],
        ),
        ("sdxl_refiner", ["conditioner.embedders.0.model.positional_embedding"]),
    ],
)
def test_the_names_are_those_that_other_readers_look_for(name, keys, files):
    state = safetensors.torch.load_file(files / f"{name}.safetensors")
    assert not [key for key in keys if key not in state]
    assert {f"{UNET}time_embed.0.weight", "first_stage_model.quant_conv.weight"} <= set(state)
    assert yaml.safe_load((files / f"{name}.yaml").read_text())["model"]["params"]["scale_factor"] > 0


def test_without_its_yaml_the_shapes_and_the_published_rules_decide(files, tmp_path, read):
    path = tmp_path / "sd1.safetensors"
    path.symlink_to(files / "sd1.safetensors")
    found = read(path)
    assert (found.denoiser.heads, found.scale.scale, found.size) == (8, 0.18215, 64 * 2)
    assert found.objective == ObjectiveConfig()
    path = tmp_path / "sd2.safetensors"
    path.symlink_to(files / "sd2.safetensors")
    with pytest.raises(ConfigError, match="Nothing says") as caught:
        read(path)
    assert "prediction=v" in caught.value.mend
    found = read(path, prediction="v")
    assert (found.objective.prediction, found.denoiser.head_dim, found.size) == ("v", 64, 96 * 2)
    assert found.encoders[0].pad_token == "!"
    assert found.encoders[0].described["hidden_act"] == "gelu"


def test_a_yaml_elsewhere_is_read(files, tmp_path, read):
    path = tmp_path / "model.safetensors"
    path.symlink_to(files / "sd2.safetensors")
    assert read(path, described=files / "sd2.yaml").objective.prediction == "v"


def test_a_checkpoint_of_the_trainer_is_read_with_its_averages_and_without_its_tables(files, tmp_path, read):
    state = safetensors.torch.load_file(files / "sd1.safetensors")
    averages = {compvis_names.ema_name(key): value + 1 for key, value in state.items() if key.startswith(UNET)}
    tables = {"betas": torch.ones(1000), "alphas_cumprod": schedules.scaled_linear(1000).alphas_cumprod.float()}
    more = {"model_ema.decay": torch.tensor(0.99), "cond_stage_model.logit_scale": torch.tensor(1.0)}
    more |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
    more |= {"first_stage_model.loss.logvar": torch.zeros(())}
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "global_step": 9, "state_dict": state | averages | tables | more}, path)
    plain = read(files / "sd1.safetensors")
    found = read(path)
    assert all(torch.equal(found.denoiser_state[key], value + 1) for key, value in plain.denoiser_state.items())
    found = read(path, ema=False)
    assert all(torch.equal(found.denoiser_state[key], value) for key, value in plain.denoiser_state.items())
    tables["alphas_cumprod"] = schedules.cosine(1000).alphas_cumprod.float()
    torch.save({"state_dict": state | tables}, path)
    with pytest.raises(ConfigError, match="other noise"):
        read(path)


def test_markers_say_what_sdxl_was_trained_on(pipelines, files, tmp_path, read):
    state = safetensors.torch.load_file(files / "sdxl.safetensors")
    path = tmp_path / "v.safetensors"
    safetensors.torch.save_file(state | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, path)
    told = yaml.safe_load((files / "sdxl.yaml").read_text())
    del told["model"]["params"]["denoiser_config"]["params"]["scaling_config"]
    path.with_suffix(".yaml").write_text(yaml.safe_dump(told))
    found = read(path)
    assert found.objective == ObjectiveConfig(prediction="v", zero_terminal_snr=True)
    single_file.write(found, tmp_path / "again.safetensors")
    assert {"v_pred", "ztsnr"} <= set(safetensors.torch.load_file(tmp_path / "again.safetensors"))
    assert read(tmp_path / "again.safetensors").objective == found.objective


def test_a_yaml_says_that_a_dropped_caption_was_the_empty_one(pipelines, files, tmp_path, read):
    """In sgm's own word; without it SDXL's base reads zeros, its refiner and SD 1 the empty caption."""
    assert [pipelines[name].zero_when_empty for name in NAMES] == [False, False, True, False]
    single_file.write(dataclasses.replace(pipelines["sdxl"], zero_when_empty=False), tmp_path / "embedded.safetensors")
    told = yaml.safe_load((tmp_path / "embedded.yaml").read_text())["model"]["params"]
    embedders = told["conditioner_config"]["params"]["emb_models"]
    assert [one.get("legacy_ucg_value") for one in embedders if one["input_key"] == "txt"] == ["", ""]
    assert not read(tmp_path / "embedded.safetensors").zero_when_empty
    for name in ("sdxl", "sdxl_refiner"):  # as published: nothing is said of it
        path = tmp_path / f"{name}.safetensors"
        path.symlink_to(files / f"{name}.safetensors")
        lines = (files / f"{name}.yaml").read_text().splitlines()
        path.with_suffix(".yaml").write_text("\n".join(one for one in lines if "legacy_ucg_value" not in one))
        assert read(path).zero_when_empty is (name == "sdxl")


class _Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_a_file_whose_reading_would_run_code_is_refused_and_not_run(suffix, tmp_path, read):
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": _Code()}, path)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert caught.value.where == str(path)
    assert "safetensors" in caught.value.mend
    assert "\x1b" not in str(caught.value) and "can still be loaded" not in str(caught.value)
    path.write_bytes(pickle.dumps(_Code()))
    with pytest.raises(ConfigError):
        read(path)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s: {}, ConfigError, "no whole checkpoint"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("cond_stage")}, ConfigError, "no whole checkpoint"),
        (
            lambda s: {f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": torch.ones(1)},
            ConfigError,
            "single file of SD 3",
        ),
        (lambda s: s | {"control_model.x": torch.ones(1)}, ArtifactError, "control_model.x belongs to no part"),
        (lambda s: s | {f"{UNET}extra.weight": torch.ones(1)}, ArtifactError, "no place"),
        (lambda s: s | {f"{UNET}time_embed.2.bias": torch.ones(7)}, ArtifactError, r"\(7,\), wanted \(128,\); 0 more"),
        (lambda s: {k: v for k, v in s.items() if k != "first_stage_model.quant_conv.bias"}, ArtifactError, "missing"),
        (
            lambda s: {k: v for k, v in s.items() if "layers.1.mlp" not in k},
            ArtifactError,
            r"missing, wanted .* 3 more",
        ),
        (lambda s: s | {f"{UNET}conv.weight": torch.ones(1)}, ArtifactError, "no place"),
    ],
)
def test_another_checkpoint_is_refused_by_its_first_key(change, error, says, files, tmp_path, read):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(files / "sd1.safetensors")), path)
    with pytest.raises(error, match=says):
        read(path)


def test_what_is_no_safetensors_file_or_has_no_tokenizer_is_refused(files, tmp_path, read):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no weights at all")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read(path)
    with pytest.raises(ConfigError, match="is not read"):
        read(tmp_path / "model.gguf")
    with pytest.raises(InputMissing) as caught:
        single_file.from_single_file(files / "sd1.safetensors", tokenizer="nobody/no-tokenizer")
    assert "tokenizer=" in caught.value.mend


@pytest.mark.parametrize(
    ("told", "where"),
    [
        ("[", ""),
        ("model: {params: {}}", ""),
        ("model: {params: {linear_end: 0.02, unet_config: {params: {}}}}", "linear_end"),
        ("model: {params: {parameterization: score, unet_config: {params: {}}}}", ""),
    ],
)
def test_a_yaml_of_another_form_is_refused(told, where, tmp_path):
    (tmp_path / "model.yaml").write_text(told)
    with pytest.raises(ConfigError) as caught:
        compvis_yaml.read(tmp_path / "model.yaml")
    assert str(tmp_path / "model.yaml") in caught.value.where
    assert where in caught.value.where


def test_the_published_yamls_are_understood(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(
        "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {linear_start: 0.00085, linear_end: 0.0120, "
        "timesteps: 1000, image_size: 64, scale_factor: 0.18215, unet_config: {params: {model_channels: 320, "
        "num_heads: 8, use_spatial_transformer: True}}}}"
    )
    told = compvis_yaml.read(path)
    assert (told.heads, told.head_dim, told.prediction, told.scale) == (8, None, "epsilon", 0.18215)
    assert (told.latent_size, told.timesteps) == (64, 1000)
    path.write_text(
        "model: {params: {parameterization: v, linear_start: 0.00085, linear_end: 0.0120, image_size: 64, "
        "first_stage_config: {params: {ddconfig: {resolution: 256}}}, "
        "unet_config: {params: {num_head_channels: 64, use_linear_in_transformer: True}}}}"
    )
    told = compvis_yaml.read(path)
    assert (told.heads, told.head_dim, told.prediction, told.latent_size) == (
        None,
        64,
        "v",
        None,
    )  # made for 768 pixels
    path.write_text(
        "model: {params: {scale_factor: 0.13025, denoiser_config: {params: {num_idx: 1000, scaling_config: {target: "
        "sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling}}}, network_config: {params: {num_head_channels: 64, "
        "adm_in_channels: 2560}}, conditioner_config: {params: {emb_models: [{input_key: txt}, "
        "{input_key: original_size_as_tuple, params: {outdim: 256}}, {input_key: crop_coords_top_left, params: {outdim: "
        "256}}, {input_key: aesthetic_score, params: {outdim: 256}}]}}}}"
    )
    told = compvis_yaml.read(path)
    assert (told.head_dim, told.prediction, told.scale, told.timesteps) == (64, "epsilon", 0.13025, 1000)
    assert (told.size_numbers, told.size_width) == (5, 256)


def test_what_the_layout_cannot_say_is_refused_before_anything_is_written(pipelines, pipeline_folder, tmp_path):
    sd1 = pipelines["sd1"]
    encoder = sd1.encoders[0]
    for changes, where in (
        ({"objective": ObjectiveConfig(schedule="cosine")}, "objective.schedule"),
        ({"denoiser": dataclasses.replace(sd1.denoiser, middle_depth=2)}, "denoiser.depth"),
        ({"denoiser": dataclasses.replace(sd1.denoiser, groups=16)}, "denoiser.groups"),
        (
            {"encoders": (dataclasses.replace(encoder, described=encoder.described | {"num_attention_heads": 4}),)},
            "text_encoders.clip.num_attention_heads",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            single_file.write(dataclasses.replace(sd1, **changes), tmp_path / "x.safetensors")
        assert caught.value.where == where
    with pytest.raises(ConfigError) as caught:
        single_file.write(diffusers_folders.from_diffusers(str(pipeline_folder("sd3"))), tmp_path / "x.safetensors")
    assert caught.value.where == "to"
    assert not list(tmp_path.iterdir())
