"""Which files of a pipeline's folder are read, from names alone; and where a folder may lie."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.checkpoint import store
from latentray.errors import ArtifactError, ConfigError, InputMissing
from latentray.interchange import diffusers_folders, folders

PUBLISHED = [
    "README.md", "model_index.json", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin", "scheduler/scheduler_config.json", "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    "vae_decoder/config.json", "vae_decoder/model.onnx", "vae_decoder/openvino_model.bin",
]  # fmt: skip
"""stable-diffusion-v1-5's, in part, and SDXL's forms for other runtimes."""
SHARDS = [f"model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "model.safetensors.index.fp16.json"


def test_of_a_published_repository_one_set_of_weights_is_taken():
    taken = folders.chosen(PUBLISHED)
    assert [name for name in taken if name.endswith((".safetensors", ".bin", ".ckpt"))] == [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert {"model_index.json", "tokenizer/merges.txt", "unet/config.json"} <= set(taken)
    half = folders.chosen(PUBLISHED, "fp16")
    assert {"unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"} <= set(half)
    assert "vae/diffusion_pytorch_model.safetensors" in half  # of which there is no half
    with pytest.raises(ConfigError, match="other variants: bf16, fp16") as caught:
        folders.weight_files(["model.fp16.safetensors", "model.bf16.safetensors"], where="text_encoder")
    assert caught.value.where == "text_encoder"
    with pytest.raises(ConfigError, match="other variants: fp16"):
        folders.weight_files(["model.fp16.safetensors"], "fp32")


def test_an_index_comes_with_what_it_may_name_and_a_whole_file_goes_before_it():
    assert folders.weight_files([INDEX, *SHARDS]) == [*SHARDS, INDEX]
    assert folders.weight_files([INDEX, *SHARDS, "model.fp16.safetensors"]) == ["model.fp16.safetensors"]
    plain = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert folders.weight_files([*plain, index, *SHARDS, INDEX]) == [*plain, index]
    assert folders.weight_files([*plain, index, *SHARDS, INDEX], "fp16") == [*SHARDS, INDEX]


def test_pickles_and_nothing_are_refused_by_name():
    with pytest.raises(ConfigError) as caught:
        folders.chosen(["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"])
    assert caught.value.where == "unet/diffusion_pytorch_model.bin"
    with pytest.raises(InputMissing) as caught:
        folders.weight_files(["config.json"], where="unet")
    assert caught.value.where == "unet"


@settings(deadline=None)
@given(st.permutations(PUBLISHED), st.sampled_from([None, "fp16"]))
def test_the_choice_does_not_depend_on_the_order_of_names(names, variant):
    assert folders.chosen(names, variant) == folders.chosen(PUBLISHED, variant)


def test_a_remote_folder_is_copied_once_and_without_pickles(pipeline_folder, moto_s3):
    folder, uri = pipeline_folder("sd1"), moto_s3.uri("sd1")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path, store.join(uri, path.relative_to(folder).as_posix()))
    store.write_bytes(store.join(uri, "unet/diffusion_pytorch_model.bin"), b"a pickle")
    here = folders.local(uri)
    assert (here / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not list(here.rglob("*.bin"))
    assert folders.local(uri) == here
    assert diffusers_folders.from_diffusers(uri).denoiser == diffusers_folders.from_diffusers(str(folder)).denoiser
    store.write_bytes(store.join(uri, "one.safetensors"), b"x")
    assert folders.local(store.join(uri, "one.safetensors")).read_bytes() == b"x"
    with pytest.raises(InputMissing):
        folders.local(moto_s3.uri("nowhere"))


@pytest.mark.parametrize(("content", "error"), [(None, InputMissing), ("{", ArtifactError), ("[1]", ArtifactError)])
def test_json_that_is_none_is_refused(content, error, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as caught:
        folders.read_json(path)
    assert caught.value.where == str(path)
