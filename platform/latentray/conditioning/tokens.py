"""Captions -> token numbers, for a denoiser that learns to embed them itself (Rombach et al. 2022, section 4.3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentray.checkpoint import store
from latentray.conditioning import text
from latentray.conditioning.text import Reading
from latentray.models import torchvision_ops
from latentray.records import TextEmbedding

KINDS = ("tokens",)
FILES = ("tokenizer.json", "tokenizer_config.json")
_TOKENS = 77


@dataclasses.dataclass(kw_only=True)
class TokenReader:
    """A tokenizer alone, as an encoder of a run: its "embeddings" are whole numbers, one wide."""

    tokenizer: Any
    name: str
    reading: Reading
    fingerprint: str
    """sha256 over tokenizer and reading: part of the key of every latent store."""
    digest: str
    """Of its manifest where it is an artifact, else its fingerprint: what lineage records."""
    folder: Path
    model: nn.Module = dataclasses.field(default_factory=nn.Module)
    """Without weights: the denoiser holds them."""

    @property
    def width(self) -> int:
        return 1

    @property
    def max_tokens(self) -> int:
        return self.reading.max_tokens or _TOKENS

    @property
    def vocabulary(self) -> int:
        """Token numbers lie below it."""
        return len(self.tokenizer)

    def is_truncated(self, caption: str) -> bool:
        """True where the tokenizer would cut the caption off."""
        return len(self.tokenizer(caption, truncation=False, verbose=False)["input_ids"]) > self.max_tokens

    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """(B captions) -> token numbers (B,L,1) int32, mask (B,L), pooled (B,0); padded to the same length."""
        ids = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return TextEmbedding(
            tokens_BLD=ids["input_ids"].to(torch.int32)[:, :, None],
            mask_BL=ids["attention_mask"].bool(),
            pooled_BD=torch.zeros(len(captions), 0),
        )

    def nothing(self) -> TextEmbedding:
        """The empty caption's."""
        return self.embed([""])

    def files(self) -> list[str]:
        """What it is read from, in its folder."""
        return files_of(self.folder, str(self.folder))


def load(source: str, *, name: str, reading: Reading, device: torch.device | str = "cpu") -> TokenReader:
    """A tokenizer from a local folder, an artifact's URI or a hub id. Raises as `text.load` does."""
    folder = text.local_folder(source)
    files = files_of(folder, source)
    torchvision_ops.ensure_importable()
    import transformers

    with text.offline():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    decides = {"tokenizer.json": store.sha256_of(folder / files[0]), "reading": reading.decides()}
    fingerprint = store.digest_of(decides)
    return TokenReader(
        tokenizer=tokenizer,
        name=name,
        reading=reading,
        fingerprint=fingerprint,
        digest=text.digest_at(source) or fingerprint,
        folder=folder,
    )


def files_of(folder: Path, where: str) -> list[str]:
    """The files a tokenizer is read from. Raises ArtifactError where one is missing."""
    return text.require_files(folder, where, FILES, what="tokenizer", mend="a fast tokenizer")
