"""Captions -> token embeddings, by a transformers CLIP text model that is frozen.

Loaded from a local folder, an artifact or a hub id. Only safetensors and JSON are read.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(kw_only=True)
class TextEncoder:
    """A frozen text model with its tokenizer."""

    model: nn.Module
    tokenizer: Any
    name: str
    fingerprint: str
    """sha256 over weights, architecture and tokenizer: part of the key of every latent store."""
    digest: str
    """Of its manifest where it is an artifact, else its fingerprint: what lineage records."""
    folder: Path
    """A local folder with the FILES."""

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def is_truncated(self, caption: str) -> bool:
        """True where the tokenizer would cut the caption off."""
        return len(self.tokenizer(caption, truncation=False, verbose=False)["input_ids"]) > self.max_tokens

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """(B captions) -> tokens (B,L,D), mask (B,L), pooled (B,D), float32 on the CPU; padded to the model's length."""
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        out = self.model(input_ids=ids["input_ids"].to(self.model.device))
        return TextEmbedding(
            tokens_BLD=out.last_hidden_state.float().cpu(),
            mask_BL=ids["attention_mask"].bool(),
            pooled_BD=out.pooler_output.float().cpu(),
        )


def load(source: str, *, name: str = "clip", device: torch.device | str = "cpu") -> TextEncoder:
    """A text encoder from a local folder, an artifact's URI or a hub id.

    Raises InputMissing where it is neither a folder nor reachable on the hub, ArtifactError where a file is missing.
    """
    folder = _local_folder(source)
    missing = [f for f in FILES[:3] if not (folder / f).is_file()]
    if missing:
        raise ArtifactError(
            f"The text encoder lacks {', '.join(missing)}.",
            where=source,
            mend="Give a folder saved with save_pretrained (safetensors weights and a fast tokenizer).",
        )
    torchvision_ops.ensure_importable()
    from transformers import AutoTokenizer, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _offline():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = CLIPTextModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    model = model.eval().requires_grad_(False).to(device)
    fingerprint = fingerprint_of(folder)
    listing = manifest.find(source) if store.exists(store.join(source, manifest.NAME)) else None
    digest = listing.digest if listing else fingerprint
    return TextEncoder(
        model=model, tokenizer=tokenizer, name=name, fingerprint=fingerprint, digest=digest, folder=folder
    )


def fingerprint_of(folder: Path) -> str:
    """sha256 over the digests of the files that decide what a caption embeds to."""
    return store.digest_of({f: store.sha256_of(folder / f) for f in FILES[:3]})


def _local_folder(source: str) -> Path:
    if store.exists(store.join(source, manifest.NAME)):
        found, files = manifest.fetch_all(source)
        folders = {p.parent for p in files.values()}
        return folders.pop() if len(folders) == 1 else _gathered(files, found)
    if not store.is_remote(source) and store.local_path(source).is_dir():
        return store.local_path(source)
    if source.count("/") > 1 or source.startswith((".", "/")) or store.is_remote(source):
        raise InputMissing("The text encoder's folder is not there.", where=source, mend="Check text_encoder.source.")
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=[*FILES, "vocab.json", "merges.txt"]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
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


class _offline:
    """transformers asks the hub even about local folders; this says no for the time of a load."""

    def __enter__(self) -> None:
        self.before = os.environ.get("HF_HUB_OFFLINE")
        os.environ["HF_HUB_OFFLINE"] = "1"

    def __exit__(self, *exc) -> None:
        if self.before is None:
            os.environ.pop("HF_HUB_OFFLINE", None)
        else:
            os.environ["HF_HUB_OFFLINE"] = self.before
