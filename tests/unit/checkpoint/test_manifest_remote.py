"""A file that an object store lacks is named as one that a disk lacks."""

from pathlib import Path

import pytest

from latentray.checkpoint import manifest, store
from latentray.errors import DigestMismatch


def test_a_missing_object_is_refused_by_name(moto_s3, tmp_path: Path):
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / "b.txt").write_text("b")
    uri = moto_s3.uri("artifact")
    manifest.publish(folder, uri, kind="dataset")
    store.delete(f"{uri}/b.txt")
    listing = manifest.read(uri)
    assert manifest.fetch_file(uri, "a.txt", listing).read_text() == "a"
    with pytest.raises(DigestMismatch, match="missing") as caught:
        manifest.fetch_file(uri, "b.txt", listing)
    assert caught.value.where == f"{uri}/b.txt"
