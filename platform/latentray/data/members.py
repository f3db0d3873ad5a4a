"""What may be in a shard, and how each member is decoded.

WebDataset's own `decode()` is never used: with its defaults it unpickles `.pyd`, `.pkl` and `.pth` members, which runs
code that the shard's author chose, and `pipe:` URLs run a shell. Here a literal table decodes what it lists; all else
is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import safetensors.torch

from latentray.conditioning.images import Preprocessing
from latentray.data import decode
from latentray.errors import DataError, SampleRejected, UnsafeMember
from latentray.records import LATENT_MEMBER, PICTURE_SUFFIXES


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "jpg": decode.decode,
    "jpeg": decode.decode,
    "png": decode.decode,
    "webp": decode.decode,
    "txt": _text,
    "json": _object,
    "cls": bytes,  # a class's number, which the index holds
    LATENT_MEMBER: safetensors.torch.load,
    "frames.safetensors": safetensors.torch.load,
    "episode.safetensors": safetensors.torch.load,
    "mp4": bytes,  # decoded where it is known which frames are wanted
}
"""Member extension (everything after the first dot of the file name) -> decoder."""

MAX_BYTES = {"json": 2**24, "txt": 2**24}
"""Members that may not be longer: 16 MiB of nested JSON can already take 500 MB once it is parsed."""

_SHELL = re.compile(r"(^|::|[{,|])\s*pipe:", re.IGNORECASE)
"""`::` and braces, since WebDataset splits a URL there."""


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
    if _SHELL.search(url.strip()):
        raise UnsafeMember("A pipe: URL runs a shell command.", where=url, mend="Give a path, or an s3:// URI.")


def decode_sample(sample: Mapping[str, Any], *, as_bytes: Collection[str] = ()) -> dict[str, Any]:
    """A raw WebDataset sample with its members decoded, by extension in lower case; entries that start with `__` pass.

    Members whose extension is in `as_bytes` stay as they are: PICTURE_SUFFIXES leaves the picture to a caller who knows
    the size it is wanted at.

    Raises UnsafeMember for a member that is not in the table, DataError for one that is too long or cannot be decoded.
    """
    shard, key = str(sample.get("__url__", "")), sample.get("__key__", "")
    decoded: dict[str, Any] = {}
    for extension, data in sample.items():
        if extension.startswith("__"):
            decoded[extension] = data
            continue
        name, kind = f"{key}.{extension}", extension.lower()
        _require_known(extension, name, shard)
        if kind in decoded:
            raise _undecodable(name, shard, "the sample has two of this kind")
        if len(data) > MAX_BYTES.get(kind, len(data)):
            raise _undecodable(name, shard, f"it has {len(data)} bytes; {MAX_BYTES[kind]} are allowed")
        try:
            decoded[kind] = data if kind in as_bytes else DECODERS[kind](data)
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
    raise _no_picture(decoded)


def _no_picture(sample: Mapping[str, Any]) -> DataError:
    return DataError(
        f"The sample {sample.get('__key__')!r} has no picture.",
        where=str(sample.get("__url__", "")),
        mend="Give a data set of pictures.",
    )


def picture_at_least(sample: Mapping[str, Any], height: int, width: int) -> tuple[Any, tuple[int, int]]:
    """The picture of a sample whose pictures were left as bytes, decoded at a scale that covers (height, width).

    Returns uint8 (H', W', 3) and the (H, W) of the whole picture. Raises DataError where there is none, or it is damaged.
    """
    for suffix in PICTURE_SUFFIXES:
        if suffix in sample:
            try:
                return decode.decode_at_least(sample[suffix], height, width)
            except SampleRejected as error:
                raise _undecodable(
                    f"{sample.get('__key__')}.{suffix}", str(sample.get("__url__", "")), error.what
                ) from None
    raise _no_picture(sample)


def view_of(sample: Mapping[str, Any], shown: Preprocessing) -> Any:
    """What a vision encoder sees of the picture of such a sample, uint8 (h, w, 3). Raises as `picture_at_least`."""
    least = max(shown.shorter, shown.height, shown.width)
    return shown.view(picture_at_least(sample, least, least)[0])


def captions_of(decoded: Mapping[str, Any]) -> list[str]:
    """The captions of a decoded sample: the `captions` of its `.json`, else its `.txt`; never empty.

    Raises DataError where `captions` is no list of strings.
    """
    listed = decoded.get("json", {}).get("captions") or [decoded.get("txt", "")]
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise DataError(
            f"The captions of sample {decoded.get('__key__')!r} are no list of texts.",
            where=str(decoded.get("__url__", "")),
            mend="Build the data set again.",
        )
    return list(listed)
