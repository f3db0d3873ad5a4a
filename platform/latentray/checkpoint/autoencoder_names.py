"""What the parts of an autoencoder are called here and in diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from latentray.config.autoencoder import AutoencoderConfig

_RES = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut"}
_ATTENTION = {
    "norm": "group_norm",
    "attn.to_q": "to_q",
    "attn.to_k": "to_k",
    "attn.to_v": "to_v",
    "attn.to_out": "to_out.0",
}
OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the attention's parts until 0.13: so they stand in the published weights of SD 1 and SD 2."""
CODEBOOK = ("quantizer.codebook_KD", "quantize.embedding.weight")


def of_autoencoder(config: AutoencoderConfig) -> Iterator[tuple[str, str]]:
    """(our module, diffusers' module) of an autoencoder: every one that holds weights, and some that this one lacks.

    The codebook is no module's weight here and stands for itself.
    """
    yield from (("encoder.quant", "quant_conv"), ("decoder.post_quant", "post_quant_conv"), CODEBOOK)
    last = len(config.channels) - 1
    for side, blocks, way in (("encoder", config.blocks, "down"), ("decoder", config.blocks + 1, "up")):
        yield from ((f"{side}.{one}", f"{side}.{one}") for one in ("conv_in", "conv_out"))
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        for level in range(last + 1):
            first = level * (blocks + 1)  # a level ends in its resampling
            for i in range(blocks):
                theirs = f"{side}.{way}_blocks.{level}.resnets.{i}"
                yield from ((f"{side}.levels.{first + i}.{a}", f"{theirs}.{b}") for a, b in _RES.items())
            if level < last:
                yield f"{side}.levels.{first + blocks}.conv", f"{side}.{way}_blocks.{level}.{way}samplers.0.conv"
        for ours, their_block in ((0, 0), (2 if config.attention else 1, 1)):
            theirs = f"{side}.mid_block.resnets.{their_block}"
            yield from ((f"{side}.middle.{ours}.{a}", f"{theirs}.{b}") for a, b in _RES.items())
        if config.attention:
            theirs = f"{side}.mid_block.attentions.0"
            yield from ((f"{side}.middle.1.{a}", f"{theirs}.{b}") for a, b in _ATTENTION.items())
