"""Text encoders and their tokenizers between a model folder and the ecosystem's folders.

Weights pass through under the names that every version of transformers reads; a tokenizer travels as tokenizer.json, and is
handed out with the vocabulary and merges that older readers ask for.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from latentray.checkpoint import weights
from latentray.checkpoint.foreign_layout import State
from latentray.conditioning import text
from latentray.errors import ArtifactError, WeightsMismatch
from latentray.interchange import folders, tokenizer_files
from latentray.models import torchvision_ops

CLASSES = {"clip": "CLIPTextModel", "clip_projection": "CLIPTextModelWithProjection", "t5": "T5EncoderModel"}
_ELSEWHERE = ("vision_model.", "visual_projection.", "logit_scale", "decoder.", "lm_head.")
"""Weights of whole CLIP and T5 models that are no part of their text encoder."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A text encoder's parts: what it is, its weights and where its tokenizer lies."""

    name: str
    reading: text.Reading
    described: dict[str, Any]
    """Its config.json."""
    state: State
    tokenizer: Path
    """A folder with tokenizer.json, or with vocabulary and merges."""
    pad_token: str | None = None
    """Where the tokenizer's folder says another."""

    @property
    def max_tokens(self) -> int | None:
        """CLIP's; None for T5, which has none of its own."""
        return self.described.get("max_position_embeddings")


def canonical(described: Mapping[str, Any], state: Mapping[str, Tensor], kind: str) -> tuple[dict[str, Any], State]:
    """config.json and weights of the text encoder alone, as `CLASSES[kind]` has them, whoever wrote them.

    A whole CLIP or T5 loses its other half, an older file its position numbers; weights of CLIP begin with `text_model.`.
    """
    found = dict(described)
    if "text_config" in found:
        found = found["text_config"] | {"model_type": "clip_text_model", "projection_dim": found.get("projection_dim")}
    found["architectures"] = [CLASSES[kind]]
    out: State = {}
    for key, value in state.items():
        if key.startswith(_ELSEWHERE) or key.endswith("position_ids"):
            continue
        if kind == "t5" and key == "encoder.embed_tokens.weight" and "shared.weight" in state:
            continue  # the same weights
        if kind == "clip" and key.startswith("text_projection."):
            continue  # which CLIPTextModel has not
        bare = kind == "t5" or key.startswith(("text_model.", "text_projection."))
        out[key if bare else f"text_model.{key}"] = value
    return found, out


def require_fit(encoder: Encoder, *, where: str) -> None:
    """Raise ArtifactError naming the first weight that the text model's configuration does not have, or has in another shape.

    ArtifactError too for a configuration of another kind of model, or with fewer layers than are counted back.
    """
    torchvision_ops.ensure_importable()
    import transformers

    kind, described = encoder.reading.kind, encoder.described
    family = "t5" if "t5" in str(described.get("model_type", "")) else "clip"
    layers = described.get("num_layers", described.get("num_hidden_layers", 0))
    if family != kind.removesuffix("_projection") or encoder.reading.layer > layers:
        raise ArtifactError(
            f"The text encoder {encoder.name!r} is a {described.get('model_type')} of {layers} layers, not the {kind} that "
            "such a pipeline reads.",
            where=where,
            mend="Give a pipeline with its own text encoders.",
        )
    network = getattr(transformers, CLASSES[kind])
    with torch.device("meta"):
        model = network(network.config_class(**described))
    own = canonical(described, model.state_dict(), kind)[1]
    require_shapes(own, encoder.state, where=where)


def require_shapes(own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str) -> None:
    """Raise WeightsMismatch naming the first key that differs, both shapes, and how many more; without loading anything."""
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [key for key in shapes if found.get(key) != shapes[key]] + [key for key in found if key not in shapes]
    if wrong:
        key = wrong[0]
        raise WeightsMismatch(
            f"The weights do not fit the architecture: {key} is {found.get(key, 'missing')}, wanted "
            f"{shapes.get(key, 'no such key')}; {len(wrong) - 1} more differ.",
            where=where,
            mend="Give weights and configuration of the same network.",
        )


def reading_of(described: Mapping[str, Any]) -> text.Reading:
    """How a model's config.json says that one of its text encoders is read."""
    return text.Reading(**{f.name: described[f.name] for f in dataclasses.fields(text.Reading) if f.name in described})


def of_model(described: Mapping[str, Any], files: Mapping[str, Path], into: Path) -> Encoder:
    """An encoder of a model folder.

    Args:
        described: its entry in the model's config.json.
        files: the model's verified files, by name.
        into: an empty folder for the tokenizer's files, which may lie in one each.
    """
    prefix = f"text_encoders/{described['name']}/"
    inside = {name.removeprefix(prefix): path for name, path in files.items() if name.startswith(prefix)}
    if not inside:  # format 1
        inside = {name.removeprefix("text_encoder/"): path for name, path in files.items() if "text_encoder/" in name}
    for name, path in inside.items():
        if not name.endswith(".safetensors"):
            shutil.copyfile(path, into / name)
    state: State = {}
    for name in sorted(inside):
        if name.endswith(".safetensors"):
            state |= weights.read(inside[name])
    reading = reading_of(described)
    config, state = canonical(folders.read_json(inside["config.json"]), state, reading.kind)
    return Encoder(name=described["name"], reading=reading, described=config, state=state, tokenizer=into)


def write_ours(encoder: Encoder, into: Path, *, where: str) -> text.TextEncoder:
    """Write the folder that a model folder takes over, and say what it is; its network stays unloaded.

    Raises ArtifactError for a tokenizer that cannot be read, or that knows more tokens than the encoder embeds.
    """
    into.mkdir(parents=True, exist_ok=True)
    (into / "config.json").write_text(json.dumps(encoder.described, indent=2, sort_keys=True) + "\n")
    save(into / "model.safetensors", encoder.state)
    tokenizer_files.bring_in(
        encoder.tokenizer,
        into,
        max_tokens=encoder.max_tokens,
        pad_token=encoder.pad_token,
        embedded=encoder.described["vocab_size"],
        where=where,
    )
    fingerprint = text.fingerprint_of(into, encoder.reading)
    return text.TextEncoder(
        model=nn.Module(),
        tokenizer=None,
        name=encoder.name,
        reading=encoder.reading,
        fingerprint=fingerprint,
        digest=fingerprint,
        folder=into,
    )


def write_theirs(encoder: Encoder, model: Path, tokenizer: Path) -> tuple[str, str]:
    """Write diffusers' two folders of an encoder; return the names of both classes, for model_index.json."""
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(encoder.described, indent=2, sort_keys=True) + "\n")
    save(model / "model.safetensors", encoder.state)
    return CLASSES[encoder.reading.kind], tokenizer_files.hand_out(
        encoder.tokenizer, tokenizer, max_tokens=encoder.max_tokens
    )


def save(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as other libraries' readers want it: they ask for the framework's name."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
