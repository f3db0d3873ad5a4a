"""What the parts of a denoiser are called here and in diffusers."""

from __future__ import annotations

from collections.abc import Iterator

from latentray.config.denoiser import DenoiserConfig

_RES = {
    "norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "skip": "conv_shortcut",
}  # fmt: skip
_ATTENTION = {
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_ADDED_ATTENTION = {
    "to_q": "add_q_proj", "to_k": "add_k_proj", "to_v": "add_v_proj", "to_out": "to_add_out",
    "norm_q": "norm_added_q", "norm_k": "norm_added_k",
}  # fmt: skip
_TRANSFORMER = {
    **{f"norm{i}": f"norm{i}" for i in (1, 2, 3)},
    **{f"attn{i}.{ours}": f"attn{i}.{theirs}" for i in (1, 2) for ours, theirs in _ATTENTION.items()},
    "ff.proj": "ff.net.0.proj",
    "ff.out": "ff.net.2",
}
_JOINT = {
    "picture.modulation": "norm1.linear",
    "text.modulation": "norm1_context.linear",
    **{f"picture.attn.{ours}": f"attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"picture.attn2.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"text.attn.{ours}": f"attn.{theirs}" for ours, theirs in _ADDED_ATTENTION.items()},
    "picture.ff.up": "ff.net.0.proj",
    "picture.ff.down": "ff.net.2",
    "text.ff.up": "ff_context.net.0.proj",
    "text.ff.down": "ff_context.net.2",
}
POSITIONS = ("positions", "pos_embed.pos_embed")


def of_unet(config: DenoiserConfig) -> Iterator[tuple[str, str]]:
    """(our module, diffusers' module) of a U-Net: every one that holds weights, and some that this one lacks."""
    yield from (
        ("time_in", "time_embedding.linear_1"), ("time_out", "time_embedding.linear_2"),
        ("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out"), ("classes", "class_embedding"),
        ("added.project.first", "add_embedding.linear_1"), ("added.project.second", "add_embedding.linear_2"),
    )  # fmt: skip

    def pair(ours: str, theirs: str, at: int, depth: int) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.res.{a}", f"{theirs}.resnets.{at}.{b}") for a, b in _RES.items())
        for a in ("norm", "proj_in", "proj_out"):
            yield f"{ours}.transformer.{a}", f"{theirs}.attentions.{at}.{a}"
        for k in range(depth):
            prefix = f"{theirs}.attentions.{at}.transformer_blocks.{k}"
            yield from ((f"{ours}.transformer.blocks.{k}.{a}", f"{prefix}.{b}") for a, b in _TRANSFORMER.items())

    n, last = config.blocks, len(config.channels) - 1
    for level in range(last + 1):
        for i in range(n):
            yield from pair(f"down.{level * n + i}", f"down_blocks.{level}", i, config.depth[level])
        yield f"down.{(level + 1) * n - 1}.resample.conv", f"down_blocks.{level}.downsamplers.0.conv"
        for i in range(n + 1):
            yield from pair(f"up.{level * (n + 1) + i}", f"up_blocks.{level}", i, config.depth[last - level])
        yield f"up.{(level + 1) * (n + 1) - 1}.resample.conv", f"up_blocks.{level}.upsamplers.0.conv"
    yield from pair("middle_in", "mid_block", 0, config.middle_depth)
    yield from ((f"middle_out.{a}", f"mid_block.resnets.1.{b}") for a, b in _RES.items())


def of_mmdit(config: DenoiserConfig) -> Iterator[tuple[str, str]]:
    """The same of an MMDiT; the table of positions is a buffer and stands for itself."""
    yield from (
        POSITIONS, ("patch_in", "pos_embed.proj"), ("context_in", "context_embedder"),
        ("time.first", "time_text_embed.timestep_embedder.linear_1"),
        ("time.second", "time_text_embed.timestep_embedder.linear_2"),
        ("pooled.first", "time_text_embed.text_embedder.linear_1"),
        ("pooled.second", "time_text_embed.text_embedder.linear_2"),
        ("modulation_out", "norm_out.linear"), ("proj_out", "proj_out"),
    )  # fmt: skip
    for i in range(config.layers):
        yield from ((f"blocks.{i}.{ours}", f"transformer_blocks.{i}.{theirs}") for ours, theirs in _JOINT.items())
