"""The decoder table: what a shard may hold, and that nothing else is ever decoded."""

import pickle
import subprocess

import pytest
import safetensors.torch
import torch

from latentray.data import members
from latentray.errors import DataError, UnsafeMember


class Bomb:
    def __reduce__(self):
        return subprocess.run, (["touch", "EXPLODED"],)


@pytest.mark.parametrize(
    "extension", ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "mp", "cbor", "gz", "", "a.pkl"]
)
def test_a_member_that_is_not_in_the_table_is_refused_by_name(extension, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = {"__key__": "k", "__url__": "s3://b/00007.tar", extension: pickle.dumps(Bomb())}
    with pytest.raises(UnsafeMember, match="k\\.") as caught:
        members.decode_sample(sample)
    assert caught.value.where == "s3://b/00007.tar"
    with pytest.raises(UnsafeMember):
        members.split_name(f"k.{extension}", shard="x.tar")
    assert not (tmp_path / "EXPLODED").exists()


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "a/../../b.png", "C:a.png", "a\\b.png", "a\0.png"])
def test_a_name_that_leaves_the_shard_is_refused(name):
    with pytest.raises(UnsafeMember, match="leaves the shard"):
        members.split_name(name, shard="x.tar")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.png", ("a", "png")), ("x.y/a.latent.safetensors", ("x.y/a", "latent.safetensors")), ("0.JPG", ("0", "JPG"))],
)
def test_names_split_as_webdataset_splits_them(name, parts):
    assert members.split_name(name, shard="x.tar") == parts


@pytest.mark.parametrize("url", ["pipe:touch /tmp/x", " PIPE:cat a.tar"])
def test_pipe_urls_are_refused(url):
    with pytest.raises(UnsafeMember):
        members.check_url(url)


def test_the_table_decodes():
    tensors = {"mean": torch.arange(3.0)}
    raw = {
        "__key__": "k",
        "txt": "é".encode(),
        "json": b'{"captions": ["a", "b"]}',
        "latent.safetensors": safetensors.torch.save(tensors),
    }
    decoded = members.decode_sample(raw)
    assert decoded["txt"] == "é"
    assert decoded["__key__"] == "k"
    assert members.captions_of(decoded) == ["a", "b"]
    assert members.captions_of({"txt": "t"}) == ["t"]
    torch.testing.assert_close(decoded["latent.safetensors"]["mean"], tensors["mean"])


@pytest.mark.parametrize(
    ("extension", "data"), [("json", b"{"), ("png", b"no"), ("txt", b"\xff"), ("latent.safetensors", b"1")]
)
def test_a_damaged_member_is_named(extension, data):
    with pytest.raises(DataError, match=f"k.{extension}") as caught:
        members.decode_sample({"__key__": "k", "__url__": "u", extension: data})
    assert not isinstance(caught.value, UnsafeMember)
    assert caught.value.where == "u"


def test_a_sample_without_a_picture_is_named():
    with pytest.raises(DataError, match="'k'"):
        members.picture_of({"__key__": "k", "txt": "t"})
