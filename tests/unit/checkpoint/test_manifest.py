"""Artifacts: the manifest comes last, and a reader names whatever was changed since."""

import json

import pytest

from latentray.checkpoint import manifest, store
from latentray.errors import AlreadyExists, ArtifactError, DigestMismatch, InputMissing, LatentrayError

FILES = {"a.bin": b"alpha", "deep/b.bin": b"beta"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "local"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    return (
        str(tmp_path / "artifact") if request.param == "local" else request.getfixturevalue("moto_s3").uri("artifact")
    )


def publish(folder, uri, **kwargs):
    given = {"kind": "model", "inputs": {"dataset": "abc"}, "config": {"lr": 0.1}, "meta": {"samples": 7}} | kwargs
    return manifest.publish(folder, uri, **given)


def flip(uri: str, at: int, bit: int = 0) -> None:
    data = bytearray(store.read_bytes(uri))
    data[at] ^= 1 << bit
    store.write_bytes(uri, bytes(data))


def test_what_is_published_is_read_back(folder, uri):
    assert manifest.find(uri) is None
    made = publish(folder, uri)
    assert manifest.find(uri) == manifest.read(uri, kind="model") == made
    assert made.inputs == {"dataset": "abc"}
    assert made.config == {"lr": 0.1}
    assert made.meta == {"samples": 7}
    assert made.packages["torch"]
    found, paths = manifest.fetch_all(uri)
    assert {name: path.read_bytes() for name, path in paths.items()} == FILES
    assert found.files["a.bin"].size == 5


def test_a_folder_without_manifest_does_not_exist(folder, uri, monkeypatch):
    def cut_short(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_json", cut_short)
        with pytest.raises(KeyboardInterrupt):
            publish(folder, uri)
    assert store.list_files(uri) == sorted(FILES)
    assert manifest.find(uri) is None
    with pytest.raises(InputMissing, match="No finished model"):
        manifest.read(uri, kind="model")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_a_file_is_named(folder, uri, name):
    found = publish(folder, uri)
    flip(store.join(uri, name), 2)
    with pytest.raises(DigestMismatch) as caught:
        manifest.fetch_file(uri, name, found)
    assert caught.value.where == store.join(uri, name)
    for other in set(FILES) - {name}:
        assert manifest.fetch_file(uri, other, found).read_bytes() == FILES[other]


def test_a_missing_file_is_named(folder, tmp_path):
    uri = str(tmp_path / "artifact")
    found = publish(folder, uri)
    store.delete(store.join(uri, "a.bin"))
    with pytest.raises(DigestMismatch, match="missing") as caught:
        manifest.fetch_file(uri, "a.bin", found)
    assert caught.value.where.endswith("a.bin")
    with pytest.raises(ArtifactError, match="lists no file"):
        manifest.fetch_file(uri, "c.bin", found)


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(folder, tmp_path, bit):
    uri = str(tmp_path / "artifact")
    made = publish(folder, uri)
    where = store.join(uri, manifest.NAME)
    good = store.read_bytes(where)
    for at in range(len(good)):
        flip(where, at, bit)
        try:
            changed = manifest.read(uri)
        except LatentrayError as error:
            assert uri in error.where  # one message that names the folder, whatever was hit
        else:
            assert changed == made, f"byte {at}: {good[at - 20 : at + 20]!r}"  # white space
        store.write_bytes(where, good)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"format": 1}', b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    store.write_bytes(tmp_path / manifest.NAME, content)
    with pytest.raises(ArtifactError):
        manifest.read(tmp_path)


def test_artifacts_are_immutable(folder, uri):
    made = publish(folder, uri)
    (folder / "a.bin").write_bytes(b"other")
    with pytest.raises(AlreadyExists) as caught:
        publish(folder, uri)
    assert caught.value.where == uri
    assert manifest.fetch_file(uri, "a.bin", made).read_bytes() == b"alpha"
    again = publish(folder, uri, replace=True)
    assert again.digest != made.digest
    assert manifest.fetch_file(uri, "a.bin", again).read_bytes() == b"other"


def test_the_wrong_kind_and_an_unknown_format_are_refused(folder, tmp_path):
    uri = str(tmp_path / "artifact")
    publish(folder, uri)
    with pytest.raises(ArtifactError, match="A dataset is wanted here, and this is a model"):
        manifest.read(uri, kind="dataset")
    raw = store.read_json(store.join(uri, manifest.NAME))
    store.write_json(store.join(uri, manifest.NAME), raw | {"format": 99})
    with pytest.raises(DigestMismatch, match="changed after it was written"):
        manifest.read(uri)
    del raw["checksum"]
    later = raw | {"format": 99}
    store.write_json(store.join(uri, manifest.NAME), later | {"checksum": store.digest_of(later)})
    with pytest.raises(ArtifactError, match="format 99"):
        manifest.read(uri)


def test_the_digest_is_that_of_the_content(folder, tmp_path):
    digests = {publish(folder, tmp_path / "one").digest, publish(folder, tmp_path / "two", config={"lr": 0.2}).digest}
    assert len(digests) == 1  # made elsewhere, with other settings: equal content
    for change in ({"kind": "release"}, {"meta": {"samples": 8}}, {"inputs": {"dataset": "abd"}}):
        digests.add(publish(folder, tmp_path / "three", replace=True, **change).digest)
    (folder / "a.bin").write_bytes(b"other")
    digests.add(publish(folder, tmp_path / "four").digest)
    assert len(digests) == 5


def test_a_manifest_is_json_with_its_digest(folder, tmp_path):
    made = publish(folder, tmp_path / "artifact")
    raw = json.loads((tmp_path / "artifact" / manifest.NAME).read_text())
    assert raw["digest"] == made.digest
    assert raw["format"] == 1
