"""Which release is to be served: the one given, or the one the registry's alias points to; and whether it is whole."""

from __future__ import annotations

import dataclasses

from latentray.checkpoint import manifest, store
from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError, InputMissing
from latentray.registry import versions
from serving.loading import read_manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """A release to serve."""

    id: str
    uri: str

    def user_config(self) -> dict[str, str]:
        """What the Sampler's `reconfigure` takes."""
        return {"release": self.uri, "release_id": self.id}


def find_release(config: ServeConfig) -> Release:
    """The release the settings name. Raises ConfigError where they name none, InputMissing where it is not there."""
    if config.release:
        uri = store.absolute(config.release)
        return Release(id=_id_of(uri, read_manifest(uri)), uri=uri)
    if not config.registry:
        raise ConfigError(
            "No release is named.",
            where="registry, release",
            mend="Set registry=<uri> and alias=<name>, or release=<uri>.",
        )
    release_id, uri = versions.resolve(store.absolute(config.registry), config.alias)
    return Release(id=release_id, uri=store.absolute(uri))


def verify(release: Release) -> None:
    """Refuse a release that is missing or damaged, before a cluster starts.

    Local files are hashed; of a remote release only the manifest and the list of files are read, since the replicas
    verify what they download.
    """
    found = read_manifest(release.uri)
    if not store.is_remote(release.uri):
        manifest.fetch_all(release.uri)
        return
    missing = sorted(set(found.files) - set(store.list_files(release.uri)))
    if missing:
        raise InputMissing(
            "A file of the release is missing.", where=store.join(release.uri, missing[0]), mend="Promote again."
        )


def _id_of(uri: str, found: manifest.Manifest) -> str:
    """A release's folder is called by its id; a model has none, so its name and digest stand for it."""
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    return name if found.kind == "release" else f"{name}-{found.digest[:12]}"
