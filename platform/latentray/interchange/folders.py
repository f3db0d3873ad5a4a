"""Where foreign weights lie, and which of the files there are read: a local folder, a URI, or an id on the Hugging Face hub.

Weights are read from safetensors alone. The choice among a folder's files is a pure function of their names, so that only
what is chosen is downloaded.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from latentray.checkpoint import store, weights
from latentray.errors import ArtifactError, ConfigError, InputMissing
from latentray.interchange import hub

INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Suffixes of files whose reading can run code; of the last, tensors alone are read, by torch."""
_STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the weights of a part; their pickles are pytorch_model.bin and the like."""
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")
"""Those with weights, of the pipelines that are exchanged. Others are left: safety checkers, other runtimes' forms."""
_TEXTS = (".json", ".txt", ".model")
_TEXT_PATTERNS = ("*.json", "*.txt", "*.model")


def local(
    source: str,
    *,
    variant: str | None = None,
    choose: Callable[[list[str]], list[str]] | None = None,
    where: str = "",
    mend: str = "",
) -> Path:
    """A local folder with a pipeline's chosen files, or a local single file.

    Args:
        source: a folder or file, local or at a URI; a hub id `owner/name`, a file in one `owner/name/file.safetensors`,
            both with `@revision` behind where another than the newest is meant.
        variant: of the files, `fp16` say; None takes those without, or the only one there is.
        choose: names of all files -> those that are read, where it is another choice than a whole pipeline's.
        where, mend: what an error about the hub says instead of the id, and of what to do.

    Raises InputMissing where it is none of these, or the hub does not give it; ConfigError for a pickle.
    """
    choose = choose or functools.partial(chosen, variant=variant)
    if store.is_remote(source):
        return _fetched(source, choose)
    path = store.local_path(source)
    if path.exists():
        return path
    if not hub.is_id(source):
        raise InputMissing("There is no such folder or file.", where=source, mend="Check weights=...")
    if source.partition("@")[0].endswith(PICKLES[:-1]):
        raise pickled(source)
    return hub.fetch(source, _TEXT_PATTERNS, choose, where=where, mend=mend)


def chosen(names: Iterable[str], variant: str | None = None, *, parts: Sequence[str] = PARTS) -> list[str]:
    """The files of a pipeline's folder that are read: texts, and of each part one set of weights.

    Args:
        parts: of PARTS; an empty name is the folder itself, of a part that lies alone.

    Raises ConfigError for a part with pickled weights only.
    """
    names = sorted(names)
    taken = [name for name in names if name.endswith(_TEXTS) and ".index." not in name and name.count("/") <= 1]
    for prefix in (f"{part}/" if part else "" for part in parts):
        below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        inside = [name for name in below if "/" not in name]
        if any(name.endswith((".safetensors", *PICKLES)) for name in inside):
            taken += [f"{prefix}{name}" for name in weight_files(inside, variant, where=prefix.rstrip("/"))]
    return taken


def weight_files(names: Sequence[str], variant: str | None = None, *, where: str = "") -> list[str]:
    """Of one part's files, those that hold its weights: one, or an index and what it may name.

    Raises ConfigError for a variant that is not there and for pickles, InputMissing without weights.
    """
    there: dict[str, list[str]] = {}
    for name in names:
        found = _variant_of(name)
        if found is not None:
            there.setdefault(found, []).append(name)
    if not there:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise pickled(str(PurePosixPath(where) / pickles[0]))
        raise InputMissing("There are no weights.", where=where, mend="Give a folder with safetensors weights.")
    wanted = variant or ""
    if wanted not in there and variant is None and len(there) == 1:
        wanted = next(iter(there))
    if wanted not in there and variant is not None and "" in there:
        wanted = ""  # a part of which there is but one, beside others that come in several
    if wanted not in there:
        known = ", ".join(sorted(one or "none" for one in there))
        raise ConfigError(
            f"The weights come in other variants: {known}.", where=where, mend="Choose with variant=<one of them>."
        )
    files = sorted(there[wanted])
    whole = [name for name in files if ".index." not in name and not re.search(r"-\d{5}-of-\d{5}", name)]
    return whole[:1] or files


def _variant_of(name: str) -> str | None:
    """`fp16` of model.fp16.safetensors, `` of model.safetensors, None of a file that holds no chosen weights."""
    found = re.fullmatch(
        rf"(?:{'|'.join(_STEMS)})(?:\.(?P<before>[\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?"
        r"\.safetensors(?:\.index(?:\.(?P<behind>[\w-]+))?\.json)?",
        name,
    )
    return None if found is None else found["before"] or found["behind"] or ""


def read_weights(folder: Path, *, variant: str | None = None) -> dict[str, Tensor]:
    """The state dict of one part of a pipeline, from one file or several under an index.

    Raises InputMissing for a file that the index names and that is not there, ArtifactError for a weight that the index
    promises and no file holds, ConfigError for pickles.
    """
    files = weight_files([path.name for path in folder.iterdir() if path.is_file()], variant, where=str(folder))
    indexes = [name for name in files if name.endswith(".json")]
    if not indexes:
        return weights.read(folder / files[0])
    places: dict[str, str] = read_json(folder / indexes[0])["weight_map"]
    out: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if not (folder / PurePosixPath(name).name).is_file():
            raise InputMissing(
                "A file of weights that the index names is not there.",
                where=str(folder / name),
                mend="Complete the download.",
            )
        out |= weights.read(folder / PurePosixPath(name).name)
    absent = [key for key in places if key not in out]
    if absent:
        raise ArtifactError(
            f"{absent[0]} is in no file, though the index names it; {len(absent) - 1} more are not.",
            where=str(folder / indexes[0]),
            mend="Complete the download.",
        )
    return out


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. Raises InputMissing where it is not there, ArtifactError where it is no mapping."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputMissing(
            "The file is not there.", where=str(path), mend="Give a pipeline's folder in diffusers' layout."
        ) from None
    except ValueError as error:
        raise ArtifactError(f"It is no JSON: {error}", where=str(path), mend="Restore the file.") from None
    if not isinstance(found, dict):
        raise ArtifactError("It is no mapping.", where=str(path), mend="Restore the file.")
    return found


def pickled(where: str) -> ConfigError:
    """The refusal of a pickle."""
    return ConfigError(
        "It is a pickle: reading it can run any code, so it is not read.",
        where=where,
        mend="Give the safetensors file that most repositories hold beside it, or convert it in a sandbox first "
        "(safetensors.torch.save_file).",
    )


def _fetched(uri: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """Local copies of a remote folder's chosen files, in this node's cache; or of a single file."""
    names = store.list_files(uri)
    if not names:
        return store.fetch(uri)
    wanted = choose(names)
    filesystem, path = store.filesystem(uri)
    found = filesystem.get_file_info([store.join(path, name) for name in wanted])
    there = [[name, one.size, str(one.mtime)] for name, one in zip(wanted, found, strict=True)]
    target = store.cache_dir() / "foreign" / store.digest_of([uri, there])
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
        try:
            for name in wanted:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(store.read_bytes(store.join(uri, name)))
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process of this node was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target
