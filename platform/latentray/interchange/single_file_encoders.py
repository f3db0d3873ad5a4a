"""Text encoders of a single file in CompVis' layout: transformers' CLIP as it is, or OpenCLIP's text model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentray.checkpoint import compvis
from latentray.checkpoint.foreign_layout import State
from latentray.errors import ArtifactError, ConfigError
from latentray.interchange import encoders
from latentray.interchange.encoders import Encoder
from latentray.interchange.layouts import Layout, Slot

TRANSFORMERS, OPEN_CLIP = ("transformer.", "quick_gelu"), ("model.", "gelu")
"""What follows an encoder's prefix in the two forms, and the activation that goes with each."""
IDLE_ENDS = ("logit_scale", "attn_mask", "position_ids")
"""Tensors of a text encoder that are no weights of what embeds captions."""
_HEAD_DIM, _PAD = 64, "!"


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """The weights under a prefix, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith(IDLE_ENDS)
    }


def read(state: State, form: tuple[str, str], slot: Slot, tokenizer: Path) -> Encoder:
    found = below(state, form[0])
    if form == OPEN_CLIP:
        found = compvis.clip_from_open_clip(found, drop_last=slot.reading.kind == "clip")
    _, found = encoders.canonical({}, found, slot.reading.kind)
    return Encoder(
        name=slot.name,
        reading=slot.reading,
        described=_described(found, form[1], slot.reading.kind),
        state=found,
        tokenizer=tokenizer,
        pad_token=_PAD if form == OPEN_CLIP else None,
    )


def _described(state: Mapping[str, Tensor], act: str, kind: str) -> dict[str, Any]:
    """config.json of a CLIP text model, from its shapes; heads are 64 wide in every one that was published."""
    token, position = "text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"
    for key in (token, position, "text_model.encoder.layers.0.mlp.fc1.weight"):
        if key not in state:
            raise ArtifactError("A weight of the text encoder is missing.", where=key, mend="Give a whole checkpoint.")
    vocabulary, width = state[token].shape
    layers = {key.split(".")[3] for key in state if key.startswith("text_model.encoder.layers.")}
    projection = state.get("text_projection.weight")
    return {
        "architectures": [encoders.CLASSES[kind]],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(width // _HEAD_DIM, 1),
        "max_position_embeddings": state[position].shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0 if act == "gelu" else vocabulary - 1,
    }


def written(encoder: Encoder, layout: Layout) -> tuple[str, State]:
    """Where an encoder's weights stand below its prefix, and under which names."""
    form = OPEN_CLIP if encoder.described.get("hidden_act", "quick_gelu") == "gelu" else TRANSFORMERS
    wanted = _described(encoder.state, form[1], encoder.reading.kind)
    wrong = [
        field
        for field in ("hidden_act", "num_attention_heads", "layer_norm_eps")
        if encoder.described.get(field, wanted[field]) != wanted[field]
    ]
    if layout.name != "sd" and form != (OPEN_CLIP if encoder.name == layout.slots[-1].name else TRANSFORMERS):
        wrong = ["hidden_act"]
    if wrong:
        raise ConfigError(
            f"The text encoder's {wrong[0]} is {encoder.described.get(wrong[0])!r}, which a single file cannot say.",
            where=f"text_encoders.{encoder.name}.{wrong[0]}",
            mend="Hand it out in diffusers' layout: to=diffusers.",
        )
    if form == TRANSFORMERS:
        return form[0], encoder.state
    state = compvis.open_clip_from_clip(encoder.state)
    if encoder.reading.kind == "clip":  # SD 2 never runs the last layer, and readers expect that there is one
        count = wanted["num_hidden_layers"]
        last = f"transformer.resblocks.{count - 1}."
        unused = {
            key.replace(last, f"transformer.resblocks.{count}."): value for key, value in state.items() if last in key
        }
        state |= {key: torch.zeros_like(value) for key, value in unused.items()}
    return form[0], state
