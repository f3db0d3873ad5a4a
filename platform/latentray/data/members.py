"""What may be in a shard, and how each member is decoded.

WebDataset's own `decode()` is never used: with its defaults it unpickles `.pyd`, `.pkl` and `.pth` members, which runs
code that the shard's author chose, and `pipe:` URLs run a shell. Here a literal table decodes what it lists; all else
is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch

from latentray.data import decode
from latentray.errors import DataError, SampleRejected, UnsafeMember
from latentray.records import LATENT_MEMBER, PICTURE_SUFFIXES


def _text(data: bytes) -> str:
    return data.decode("utf-8")


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "jpg": decode.decode,
    "jpeg": decode.decode,
    "png": decode.decode,
    "webp": decode.decode,
    "txt": _text,
    "json": json.loads,
    LATENT_MEMBER: safetensors.torch.load,
}
"""Member extension (everything after the first dot of the file name) -> decoder."""


def split_name(name: str, *, shard: str) -> tuple[str, str]:
    """`(key, extension)` of a member's name. Raises UnsafeMember unless it stays in the shard and can be decoded."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in parts or name[1:2] == ":":
        raise UnsafeMember(
            f"A shard's member has a path that leaves the shard: {name!r}.", where=shard, mend="Do not use this shard."
        )
    stem, _, extension = parts[-1].partition(".")
    key = "/".join([*parts[:-1], stem])
    _require_known(extension, name, shard)
    return key, extension


def _require_known(extension: str, name: str, shard: str) -> None:
    if extension.lower() not in DECODERS:
        raise UnsafeMember(
            f"A shard holds a member that is not decoded: {name!r}.",
            where=shard,
            mend=f"Keep only members of these kinds: {', '.join(sorted(DECODERS))}.",
        )


def check_url(url: str) -> None:
    """Raise UnsafeMember for a URL that WebDataset would hand to a shell."""
    if url.strip().lower().startswith("pipe:"):
        raise UnsafeMember("A pipe: URL runs a shell command.", where=url, mend="Give a path, or an s3:// URI.")


def decode_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A raw WebDataset sample with its members decoded; entries that start with `__` pass as they are.

    Raises UnsafeMember for a member that is not in the table, DataError for one that cannot be decoded.
    """
    shard, key = str(sample.get("__url__", "")), sample.get("__key__", "")
    decoded: dict[str, Any] = {}
    for extension, data in sample.items():
        if extension.startswith("__"):
            decoded[extension] = data
            continue
        name = f"{key}.{extension}"
        _require_known(extension, name, shard)
        try:
            decoded[extension] = DECODERS[extension.lower()](data)
        except SampleRejected as error:
            raise _undecodable(name, shard, error.what) from None
        except Exception as error:  # json, unicode and safetensors each have their own
            raise _undecodable(name, shard, str(error)) from None
    return decoded


def _undecodable(name: str, shard: str, why: str) -> DataError:
    return DataError(f"The member {name!r} cannot be decoded: {why}", where=shard, mend="Build the data set again.")


def picture_of(decoded: Mapping[str, Any]) -> Any:
    """The picture of a decoded sample, uint8 (H, W, 3). Raises DataError where it has none."""
    for suffix in PICTURE_SUFFIXES:
        if suffix in decoded:
            return decoded[suffix]
    raise DataError(
        f"The sample {decoded.get('__key__')!r} has no picture.",
        where=str(decoded.get("__url__", "")),
        mend="Give a data set of pictures.",
    )


def captions_of(decoded: Mapping[str, Any]) -> list[str]:
    """The captions of a decoded sample: the `captions` of its `.json`, else its `.txt`; never empty."""
    listed = (decoded.get("json") or {}).get("captions")
    return list(listed) if listed else [decoded.get("txt", "")]
