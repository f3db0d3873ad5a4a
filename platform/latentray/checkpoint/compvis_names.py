"""What the parts of a network are called here and in a single file of CompVis' layout (SD 1, SD 2, SDXL)."""

from __future__ import annotations

from collections.abc import Iterator

from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig

_RES = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "skip": "skip_connection",
}  # fmt: skip
_ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_TRANSFORMER = {
    **{f"norm{i}": f"norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.{ours}": f"attn{i}.{theirs}" for i in (1, 2) for ours, theirs in _ATTENTION.items()},
    "ff.proj": "ff.net.0.proj",
    "ff.out": "ff.net.2",
}
_AUTOENCODER_RES = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
_AUTOENCODER_ATTENTION = {
    "norm": "norm", "attn.to_q": "q", "attn.to_k": "k", "attn.to_v": "v", "attn.to_out": "proj_out",
}  # fmt: skip


def of_unet(config: DenoiserConfig) -> Iterator[tuple[str, str]]:
    """(our module, CompVis' module) of a U-Net: every one that holds weights, and some that this one lacks."""
    yield from (
        ("time_in", "time_embed.0"), ("time_out", "time_embed.2"), ("conv_in", "input_blocks.0.0"),
        ("norm_out", "out.0"), ("conv_out", "out.2"), ("classes", "label_emb"),
        ("added.project.first", "label_emb.0.0"), ("added.project.second", "label_emb.0.2"),
    )  # fmt: skip

    def pair(ours: str, theirs: str, depth: int, at: int = 0) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.res.{a}", f"{theirs}.{at}.{b}") for a, b in _RES.items())
        if depth:
            yield from ((f"{ours}.transformer.{a}", f"{theirs}.{at + 1}.{a}") for a in ("norm", "proj_in", "proj_out"))
        for k in range(depth):
            prefix = f"{theirs}.{at + 1}.transformer_blocks.{k}"
            yield from ((f"{ours}.transformer.blocks.{k}.{a}", f"{prefix}.{b}") for a, b in _TRANSFORMER.items())

    n, last = config.blocks, len(config.channels) - 1
    for level in range(last + 1):
        for i in range(n):
            yield from pair(f"down.{level * n + i}", f"input_blocks.{level * (n + 1) + i + 1}", config.depth[level])
        if level < last:
            yield f"down.{(level + 1) * n - 1}.resample.conv", f"input_blocks.{(level + 1) * (n + 1)}.0.op"
        depth = config.depth[last - level]
        for i in range(n + 1):
            yield from pair(f"up.{level * (n + 1) + i}", f"output_blocks.{level * (n + 1) + i}", depth)
        if level < last:
            at = (level + 1) * (n + 1) - 1
            yield f"up.{at}.resample.conv", f"output_blocks.{at}.{2 if depth else 1}.conv"
    yield from pair("middle_in", "middle_block", config.middle_depth)
    behind = 2 if config.middle_depth else 1
    yield from ((f"middle_out.{a}", f"middle_block.{behind}.{b}") for a, b in _RES.items())


def of_autoencoder(config: AutoencoderConfig) -> Iterator[tuple[str, str]]:
    """The same of a KL autoencoder. CompVis counts the decoder's levels from the finest, as the encoder's."""
    yield from (("encoder.quant", "quant_conv"), ("decoder.post_quant", "post_quant_conv"))
    last = len(config.channels) - 1
    for side, blocks, way in (("encoder", config.blocks, "down"), ("decoder", config.blocks + 1, "up")):
        yield from ((f"{side}.{one}", f"{side}.{one}") for one in ("conv_in", "norm_out", "conv_out"))
        for step in range(last + 1):
            first = step * (blocks + 1)  # a level ends in its resampling
            level = step if way == "down" else last - step
            for i in range(blocks):
                theirs = f"{side}.{way}.{level}.block.{i}"
                yield from ((f"{side}.levels.{first + i}.{a}", f"{theirs}.{b}") for a, b in _AUTOENCODER_RES.items())
            if step < last:
                yield f"{side}.levels.{first + blocks}.conv", f"{side}.{way}.{level}.{way}sample.conv"
        for ours, number in ((0, 1), (2 if config.attention else 1, 2)):
            theirs = f"{side}.mid.block_{number}"
            yield from ((f"{side}.middle.{ours}.{a}", f"{theirs}.{b}") for a, b in _AUTOENCODER_RES.items())
        if config.attention:
            theirs = f"{side}.mid.attn_1"
            yield from ((f"{side}.middle.1.{a}", f"{theirs}.{b}") for a, b in _AUTOENCODER_ATTENTION.items())


OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
"""Parts of a text layer in transformers' CLIP and in OpenCLIP; queries, keys and values are one `attn.in_proj` there."""
OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
"""Single tensors of the same; `text_projection` stands the other way round."""

EMA_PREFIX = "model_ema."


def ema_name(key: str) -> str:
    """Where a file of CompVis' trainer holds the average of a weight of `model.`: its name without the dots."""
    return EMA_PREFIX + key.removeprefix("model.").replace(".", "")
