"""Tokenizers: as tokenizer.json in a model folder, with vocabulary and merges besides where they are handed out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentray.errors import ArtifactError, InputMissing
from latentray.interchange import folders, hub
from latentray.models import torchvision_ops

_CARRIED = "spiece.model"
"""What cannot be written from tokenizer.json."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_PRIVATE = ("is_local", "local_files_only", "name_or_path", "backend")


def bring_in(
    source: Path, into: Path, *, max_tokens: int | None, pad_token: str | None = None, embedded: int, where: str
) -> None:
    """Write tokenizer.json and tokenizer_config.json, from these or from vocabulary and merges.

    Args:
        max_tokens: the length captions are padded to; None where the text encoder has none of its own.
        pad_token: where the source says another.
        embedded: how many tokens the text encoder embeds.

    Raises ArtifactError for a tokenizer that cannot be read, or that knows more tokens than the encoder embeds.
    """
    with tempfile.TemporaryDirectory(prefix="latentray-tokenizer-") as scratch:
        whole = source if (source / "tokenizer.json").is_file() else _converted(source, Path(scratch), where=where)
        for folder, name in ((whole, "tokenizer.json"), (source, _CARRIED)):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, into / name)
        settings = _settings(whole, max_tokens, pad_token)
    (into / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    from tokenizers import Tokenizer

    try:
        known = Tokenizer.from_file(str(into / "tokenizer.json")).get_vocab_size()
    except Exception as error:  # the library raises plain Exception
        raise ArtifactError(
            f"The tokenizer cannot be read: {error}", where=where, mend="Restore tokenizer.json."
        ) from None
    if known > embedded:
        raise ArtifactError(
            f"The tokenizer knows {known} tokens, and the text encoder embeds {embedded}.",
            where=where,
            mend="Give the tokenizer that the text encoder was trained with.",
        )


def _converted(source: Path, into: Path, *, where: str) -> Path:
    """The same tokenizer as tokenizer.json, from its vocabulary and merges."""
    torchvision_ops.ensure_importable()
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(into)
    except Exception as error:  # of many kinds, by what is missing
        raise ArtifactError(
            f"The tokenizer cannot be read: {str(error).splitlines()[0]}",
            where=where,
            mend="Give a folder with tokenizer.json, or with vocab.json and merges.txt.",
        ) from None
    if not (into / "tokenizer.json").is_file():
        raise ArtifactError("The tokenizer has no tokenizer.json.", where=where, mend="Give one that has.")
    return into


def _settings(source: Path, max_tokens: int | None, pad_token: str | None) -> dict[str, Any]:
    """tokenizer_config.json without what belongs to the machine that wrote it, with special tokens and length."""
    path = source / "tokenizer_config.json"
    found = folders.read_json(path) if path.is_file() else {}
    if (source / "special_tokens_map.json").is_file():
        for name, token in folders.read_json(source / "special_tokens_map.json").items():
            if name in _SPECIAL:
                found.setdefault(name, token if isinstance(token, str) else token.get("content"))
    found = {key: value for key, value in found.items() if key not in _PRIVATE}
    if max_tokens is not None:
        found["model_max_length"] = max_tokens
    if pad_token is not None:
        found["pad_token"] = pad_token
    return found


def hand_out(source: Path, into: Path, *, max_tokens: int | None) -> str:
    """Write a tokenizer's folder for diffusers' pipelines and older transformers; return its class."""
    into.mkdir(parents=True)
    described = folders.read_json(source / "tokenizer.json")
    settings = _settings(source, max_tokens, None)
    name = _class_of(settings, described["model"])
    if name == "CLIPTokenizer":
        (into / "vocab.json").write_text(json.dumps(_vocabulary(described), ensure_ascii=False), encoding="utf-8")
        merges = (one if isinstance(one, str) else " ".join(one) for one in described["model"]["merges"])
        (into / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    for file in ("tokenizer.json", _CARRIED):
        if (source / file).is_file():
            shutil.copyfile(source / file, into / file)
    settings["tokenizer_class"] = name
    (into / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    special = {key: settings[key] for key in _SPECIAL if isinstance(settings.get(key), str)}
    (into / "special_tokens_map.json").write_text(json.dumps(special, indent=2, sort_keys=True) + "\n")
    return name


def _class_of(settings: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """CLIP's or T5's own class for their own tokenizers alone: these classes rebuild all but the vocabulary by their rules."""
    said = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if not said and model.get("type") == "BPE" and model.get("end_of_word_suffix") == "</w>":
        said = "CLIPTokenizer"
    return {"CLIPTokenizer": "CLIPTokenizer", "T5Tokenizer": "T5TokenizerFast"}.get(said, "PreTrainedTokenizerFast")


def _vocabulary(described: Mapping[str, Any]) -> dict[str, int]:
    """Token -> number, with the added ones: older readers look for the special tokens there."""
    added = {one["content"]: one["id"] for one in described.get("added_tokens", ())}
    return dict(sorted((described["model"]["vocab"] | added).items(), key=lambda item: item[1]))


def located(source: str) -> Path:
    """The folder of a tokenizer by its path or hub id, for weights that come without one. Raises InputMissing."""
    path = Path(source)
    if path.is_dir():
        return path
    if not hub.is_id(source):
        raise InputMissing("The tokenizer's folder is not there.", where=source, mend="Check tokenizer=...")
    return hub.fetch(
        source,
        _FILES,
        lambda names: [],
        mend="A single file holds no tokenizer: set tokenizer=<folder with CLIP's vocab.json and merges.txt>, or check the "
        "network.",
    )
