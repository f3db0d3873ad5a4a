"""Captions -> token embeddings, by a transformers text model that is frozen: CLIP, OpenCLIP with its projection, or T5.

Loaded from a local folder, an artifact or a hub id. Only safetensors and JSON are read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentray.checkpoint import manifest, store
from latentray.errors import ArtifactError, InputMissing
from latentray.models import torchvision_ops
from latentray.records import TextEmbedding

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_SHARDS = "model.safetensors.index.json"
_T5_TOKENS = 256
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What encoders that are not trained compute in, autoencoders too, by the names that settings give it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How a text model is read: which class it is, which of its hidden states, how many tokens."""

    kind: str = "clip"
    """clip, clip_projection or t5; clip_vision reads pictures, tokens captions as they are."""
    layer: int = 1
    """Counted from the last; 1 is the model's output, normalised where it is text."""
    max_tokens: int | None = None
    """t5 and tokens: their own number has no limit."""
    precision: str = "fp32"
    """fp32 or bf16: what the network computes in."""

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def decides(self) -> dict[str, Any]:
        """What fingerprints are made of. That of fp32 is as it was before there was another precision."""
        return {k: v for k, v in dataclasses.asdict(self).items() if (k, v) != ("precision", "fp32")}


@dataclasses.dataclass(kw_only=True)
class TextEncoder:
    """A frozen text model with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    name: str
    reading: Reading = Reading()
    fingerprint: str
    """sha256 over weights, architecture, tokenizer and reading: part of the key of every latent store."""
    digest: str
    """Of its manifest where it is an artifact, else its fingerprint: what lineage records."""
    folder: Path
    """A local folder with the FILES."""

    @property
    def width(self) -> int:
        """Of a token's embedding."""
        return int(self.model.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        if self.reading.kind == "t5":
            return self.reading.max_tokens or _T5_TOKENS
        return int(self.model.config.max_position_embeddings)

    def is_truncated(self, caption: str) -> bool:
        """True where the tokenizer would cut the caption off."""
        return len(self.tokenizer(caption, truncation=False, verbose=False)["input_ids"]) > self.max_tokens

    def files(self) -> list[str]:
        """What it is read from, in its folder."""
        return files_of(self.folder, str(self.folder))

    def nothing(self) -> TextEmbedding:
        """The empty caption's embedding, a row."""
        return self.embed([""])

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """(B captions) -> tokens (B,L,D), mask (B,L), pooled (B,D), float32 on the CPU; padded to the model's length.

        T5 has no pooled text: (B,0).
        """
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        inner = self.reading.layer > 1
        out = self.model(input_ids=ids["input_ids"].to(self.model.device), output_hidden_states=inner)
        tokens = out.hidden_states[-self.reading.layer] if inner else out.last_hidden_state
        pooled = _POOLED[self.reading.kind]
        return TextEmbedding(
            tokens_BLD=tokens.float().cpu(),
            mask_BL=ids["attention_mask"].bool(),
            pooled_BD=out[pooled].float().cpu() if pooled else torch.zeros(len(tokens), 0),
        )


KINDS = ("clip", "clip_projection", "t5")
_CLASSES = {"clip": "CLIPTextModel", "clip_projection": "CLIPTextModelWithProjection", "t5": "T5EncoderModel"}
_POOLED = {"clip": "pooler_output", "clip_projection": "text_embeds", "t5": None}


def load(
    source: str, *, name: str = "clip", reading: Reading = Reading(), device: torch.device | str = "cpu"
) -> TextEncoder:
    """A text encoder from a local folder, an artifact's URI or a hub id, with `@revision` behind it where one is meant.

    Raises InputMissing where it is neither a folder nor reachable on the hub, ArtifactError where a file is missing, or the
    model is of another kind, or has fewer layers.
    """
    folder = local_folder(source)
    files_of(folder, source)
    torchvision_ops.ensure_importable()
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    with offline():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        _require_kind(folder, reading, source)
        model = getattr(transformers, _CLASSES[reading.kind]).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=reading.dtype
        )
    model = model.eval().requires_grad_(False).to(device)
    fingerprint = fingerprint_of(folder, reading)
    digest = digest_at(source) or fingerprint
    return TextEncoder(
        model=model,
        tokenizer=tokenizer,
        name=name,
        reading=reading,
        fingerprint=fingerprint,
        digest=digest,
        folder=folder,
    )


def digest_at(source: str) -> str | None:
    """Of the artifact at a source; None where it is none."""
    listing = manifest.find(source) if store.exists(store.join(source, manifest.NAME)) else None
    return listing.digest if listing else None


def require_files(folder: Path, where: str, files: Sequence[str], *, what: str, mend: str) -> list[str]:
    """The files, those that are there; `*_config.json` of a tokenizer may be missing.

    Raises ArtifactError for another, and for weights that are pickled.
    """
    missing = [name for name in files if name != FILES[3] and not (folder / name).is_file()]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if FILES[1] in missing and pickles:
        raise ArtifactError(
            f"The {what}'s weights are a pickle, {pickles[0]}: reading it can run any code, so it is not read.",
            where=where,
            mend="Convert it where you trust it: load it with transformers, and save it with "
            "save_pretrained(folder, safe_serialization=True).",
        )
    if missing:
        raise ArtifactError(
            f"The {what} lacks {', '.join(missing)}.",
            where=where,
            mend=f"Give a folder saved with save_pretrained ({mend}); pickles (pytorch_model.bin) are not read.",
        )
    return [name for name in files if (folder / name).is_file()]


def files_of(folder: Path, where: str) -> list[str]:
    """The files an encoder is read from: the FILES, or several of weights and their index. Raises ArtifactError."""
    weights = [FILES[1]]
    if (folder / _SHARDS).is_file():
        weights = [_SHARDS, *sorted(set(json.loads((folder / _SHARDS).read_text())["weight_map"].values()))]
    wanted = (FILES[0], *weights, *FILES[2:])
    return require_files(folder, where, wanted, what="text encoder", mend="safetensors weights and a fast tokenizer")


def fingerprint_of(folder: Path, reading: Reading = Reading()) -> str:
    """sha256 over the digests of the files that decide what a caption embeds to, and how they are read."""
    decides: dict[str, Any] = {f: store.sha256_of(folder / f) for f in files_of(folder, str(folder)) if f != FILES[3]}
    if reading != Reading():
        decides["reading"] = reading.decides()
    return store.digest_of(decides)


def _require_kind(folder: Path, reading: Reading, where: str) -> None:
    described = json.loads((folder / FILES[0]).read_text())
    family = "t5" if "t5" in described.get("model_type", "") else "clip"
    if family != reading.kind.removesuffix("_projection"):
        raise ArtifactError(
            f"The text encoder is a {described.get('model_type')}, and a {reading.kind} is asked for.",
            where=where,
            mend="Set text_encoder.kind to what it is.",
        )
    layers = described.get("num_layers") or described.get("num_hidden_layers")
    if layers is not None and reading.layer > layers:
        raise ArtifactError(
            f"The text encoder has {layers} layers, and the {reading.layer}th from the last is asked for.",
            where=where,
            mend="Lower text_encoder.layer.",
        )


def local_folder(source: str) -> Path:
    if store.exists(store.join(source, manifest.NAME)):
        found, files = manifest.fetch_all(source)
        folders = {p.parent for p in files.values()}
        return folders.pop() if len(folders) == 1 else _gathered(files, found)
    if not store.is_remote(source) and store.local_path(source).is_dir():
        return store.local_path(source)
    if source.count("/") > 1 or source.startswith((".", "/")) or store.is_remote(source):
        raise InputMissing("The text encoder's folder is not there.", where=source, mend="Check text_encoder.source.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    id_, _, revision = source.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                id_,
                revision=revision or None,
                allow_patterns=[
                    *FILES,
                    _SHARDS,
                    "model-*.safetensors",
                    "vocab.json",
                    "merges.txt",
                    "preprocessor_config.json",
                ],
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # no network and not in the cache is an OSError too
        raise InputMissing(
            f"The text encoder is no local folder, and the hub did not give it ({type(error).__name__}).",
            where=source,
            mend="Set text_encoder.source to a folder saved with save_pretrained, or check the hub id and the network.",
        ) from None


def _gathered(files: dict[str, Path], found: manifest.Manifest) -> Path:
    """transformers reads one folder, and cached files of a remote artifact lie in one each: gather them once per node."""
    target = store.cache_dir() / "text_encoders" / found.digest
    if target.is_dir():
        if all((target / n).is_file() and store.sha256_of(target / n) == e.sha256 for n, e in found.files.items()):
            return target
        shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        for name, path in files.items():
            shutil.copyfile(path, partial / name)
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process of this node was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


class offline:
    """transformers asks the hub even about local folders; this says no for the time of a load."""

    def __enter__(self) -> None:
        self.before = os.environ.get("HF_HUB_OFFLINE")
        os.environ["HF_HUB_OFFLINE"] = "1"

    def __exit__(self, *exc) -> None:
        if self.before is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = self.before
