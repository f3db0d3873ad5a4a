"""The Hugging Face hub, by its own client: an id in place of a folder or a file, with the client's cache, token and endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from latentray.checkpoint import store
from latentray.errors import InputMissing

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w./-]+)?(@[\w./-]+)?")


def is_id(source: str) -> bool:
    """Whether a source can only be on the hub: `owner/name`, a file in one `owner/name/file`, with `@revision` behind it."""
    return not store.is_remote(source) and not store.local_path(source).exists() and bool(_ID.fullmatch(source))


def repository(source: str) -> str:
    """`owner/name` of an id."""
    return "/".join(source.partition("@")[0].split("/")[:2])


def commit_of(path: Path) -> str | None:
    """The commit that a file or folder of the client's cache belongs to; None for one that lies elsewhere."""
    _, found, behind = path.as_posix().rpartition("/snapshots/")
    return behind.split("/", 1)[0] if found else None


def fetch(
    source: str,
    texts: Sequence[str],
    choose: Callable[[list[str]], list[str]],
    *,
    where: str = "",
    mend: str = "",
) -> Path:
    """A local copy of a file, or a local folder with the chosen files of a repository.

    Without a network it is what the client's cache holds; what it lacks is refused when it is read.

    Args:
        texts: patterns of the small files, which are fetched in any case.
        choose: names of all files -> those that are fetched besides.
        where: what the error names instead of the id, such as the setting that gave it.
        mend: what the user can do besides.

    Raises InputMissing where neither the hub nor the cache has it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, _, revision = source.partition("@")
    owner, repository, *inside = name.split("/")
    id_, at = f"{owner}/{repository}", revision or None
    try:
        if inside:
            return Path(huggingface_hub.hf_hub_download(id_, "/".join(inside), revision=at))
        folder = Path(huggingface_hub.snapshot_download(id_, revision=at, allow_patterns=list(texts)))
        names = _listed(id_, at)
        if names is None:
            return folder
        return Path(huggingface_hub.snapshot_download(id_, revision=at, allow_patterns=[*texts, *choose(names)]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # no network and not in the cache is an OSError too
        raise InputMissing(
            f"It is no local folder or file, and the hub did not give it ({type(error).__name__}).",
            where=where or source,
            mend=mend
            or "Check the id and the network, log in with `hf auth login` where the repository asks for it, or download it "
            "elsewhere and give the folder.",
        ) from None


def _listed(id_: str, revision: str | None) -> list[str] | None:
    """Names of a repository's files; None where the hub cannot be asked."""
    import huggingface_hub

    try:
        return list(huggingface_hub.HfApi().list_repo_files(id_, revision=revision))
    except Exception:  # of the client's transport, or offline: the cache has what it has
        return None
