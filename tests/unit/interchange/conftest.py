"""Tiny pipelines of SD 1, SD 2, SDXL and SD 3 with random weights, made by diffusers and transformers themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from latentray.models import torchvision_ops

torchvision_ops.ensure_importable()
import diffusers  # noqa: E402  (it imports torchvision)
import transformers  # noqa: E402
from tokenizers import pre_tokenizers  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()

WORDS = ["a", "red", "circle", "on", "white", "blue", "square"]
START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS, WIDTH = 16, 64
SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def write_clip_tokenizer(folder: Path, *, pad_token: str = END) -> Path:
    """CLIP's own form with a small vocabulary: vocab.json and merges.txt, and no tokenizer.json."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *(one + "</w>" for one in letters)])}
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("b", "l"), ("bl", "u")]
    for token in [*("".join(pair) for pair in merges), START, END]:
        vocabulary[token] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    special = dict(bos_token=START, eos_token=END, unk_token=END, pad_token=pad_token)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=TOKENS, **special)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory) -> Path:
    return write_clip_tokenizer(tmp_path_factory.mktemp("tokenizer") / "clip")


def _clip(kind: str, folder: Path, *, layers: int = 3, act: str = "quick_gelu", projection: int = 48) -> Any:
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=1,
        max_position_embeddings=TOKENS, vocab_size=vocabulary, hidden_act=act, projection_dim=projection,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def _t5() -> tuple[Any, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    config = transformers.T5Config(
        d_model=160, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=32, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config), tokenizer


def _kl(latent_channels: int = 4, **settings: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32), latent_channels=latent_channels, layers_per_block=1, norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
        **settings,
    )  # fmt: skip


def _unet(**settings: Any) -> Any:
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(
        **dict(
            block_out_channels=(32, 64), layers_per_block=1, down_block_types=down, up_block_types=up,
            cross_attention_dim=WIDTH, attention_head_dim=8, sample_size=16,
        ) | settings
    )  # fmt: skip


def _sd1(tokenizer: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_kl(), text_encoder=_clip("CLIPTextModel", tokenizer), unet=_unet(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SCALED),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _inpainting(tokenizer: Path) -> Any:
    return diffusers.StableDiffusionInpaintPipeline(
        vae=_kl(), text_encoder=_clip("CLIPTextModel", tokenizer), unet=_unet(in_channels=9),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **SCALED),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sd2(tokenizer: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_kl(), text_encoder=_clip("CLIPTextModel", tokenizer, act="gelu"),
        unet=_unet(attention_head_dim=(1, 2), block_out_channels=(64, 128), use_linear_projection=True),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer, pad_token="!"),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **SCALED),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(tokenizer: Path) -> Any:
    unet = _unet(
        block_out_channels=(64, 128), attention_head_dim=(1, 2), cross_attention_dim=2 * WIDTH,
        use_linear_projection=True, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_kl(scaling_factor=0.13025), unet=unet, text_encoder=_clip("CLIPTextModel", tokenizer),
        text_encoder_2=_clip("CLIPTextModelWithProjection", tokenizer, act="gelu"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(tokenizer, pad_token="!"),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SCALED),
    )  # fmt: skip


def _refiner(tokenizer: Path) -> Any:
    unet = _unet(
        block_out_channels=(64, 128), attention_head_dim=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + 5 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=_kl(scaling_factor=0.13025), unet=unet, text_encoder=None, tokenizer=None,
        text_encoder_2=_clip("CLIPTextModelWithProjection", tokenizer, act="gelu"),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(tokenizer, pad_token="!"),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **SCALED),
        requires_aesthetics_score=True, force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def _sd3(tokenizer: Path) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=160, caption_projection_dim=32, pooled_projection_dim=96,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    t5, t5_tokenizer = _t5()
    return diffusers.StableDiffusion3Pipeline(
        vae=_kl(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer, text_encoder=_clip("CLIPTextModelWithProjection", tokenizer),
        text_encoder_2=_clip("CLIPTextModelWithProjection", tokenizer, act="gelu"), text_encoder_3=t5,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        tokenizer_2=transformers.CLIPTokenizer.from_pretrained(tokenizer, pad_token="!"), tokenizer_3=t5_tokenizer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


_MAKERS: dict[str, Callable[[Path], Any]] = {
    "sd1": _sd1, "inpainting": _inpainting, "sd2": _sd2, "sdxl": _sdxl, "sdxl_refiner": _refiner, "sd3": _sd3,
}  # fmt: skip
NAMES = tuple(_MAKERS)


def make(name: str, tokenizer: Path) -> Any:
    """A pipeline in memory. Biases and norms are random too, so that none can be mistaken for another."""
    torch.manual_seed(0)
    pipeline = _MAKERS[name](tokenizer)
    with torch.no_grad():
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for parameter in part.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.05 * torch.randn_like(parameter))
    return pipeline


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory, clip_tokenizer) -> Callable[[str], Path]:
    """name -> a folder saved by diffusers, once per session."""
    root, made = tmp_path_factory.mktemp("pipelines"), set()

    def folder(name: str) -> Path:
        if name not in made:
            make(name, clip_tokenizer).save_pretrained(root / name)
            made.add(name)
        return root / name

    return folder


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Callable[..., Path]:
    """(id, folder, commit) -> the folder as the hub client's cache holds it: a commit's snapshot, which `main` points to."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def put(name: str, folder: Path, commit: str = "0123456789abcdef0123456789abcdef01234567") -> Path:
        repository = root / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return shutil.copytree(folder, repository / "snapshots" / commit)

    return put
