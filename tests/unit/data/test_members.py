"""The decoder table: what a shard may hold, and that nothing else is ever decoded."""

import io
import pickle
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentray.data import decode, members
from latentray.errors import DataError, UnsafeMember
from latentray.records import PICTURE_SUFFIXES

CODE = ["pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ckpt", "bin", "mp", "cbor", "gz", "", "a.pkl"]
"""Members that some reader would unpickle, or that no one here reads."""

names = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0."), min_size=2, max_size=6)


class Bomb:
    def __reduce__(self):
        return subprocess.run, (["touch", "EXPLODED"],)


@pytest.mark.parametrize("extension", CODE)
def test_a_member_that_is_not_in_the_table_is_refused_by_name(extension, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample = {"__key__": "k", "__url__": "s3://b/00007.tar", extension: pickle.dumps(Bomb())}
    with pytest.raises(UnsafeMember, match="k\\.") as caught:
        members.decode_sample(sample)
    assert caught.value.where == "s3://b/00007.tar"
    with pytest.raises(UnsafeMember):
        members.decode_sample(sample, as_bytes=[extension])
    with pytest.raises(UnsafeMember):
        members.split_name(f"k.{extension}", shard="x.tar")
    assert not (tmp_path / "EXPLODED").exists()


@given(
    folder=st.lists(names, max_size=2),
    stem=names,
    prefix=st.sampled_from(["", "png.", "json."]),
    code=st.sampled_from(CODE),
    upper=st.booleans(),
)
def test_no_name_makes_code_a_member(folder, stem, prefix, code, upper):
    name = "/".join([*folder, f"{stem}.{prefix}{code.upper() if upper else code}"])
    with pytest.raises(UnsafeMember) as caught:
        members.split_name(name, shard="7.tar")
    assert repr(name) in caught.value.what and caught.value.where == "7.tar"


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "a/../../b.png", "C:a.png", "a\\b.png", "a\0.png"])
def test_a_name_that_leaves_the_shard_is_refused(name):
    with pytest.raises(UnsafeMember, match="leaves the shard"):
        members.split_name(name, shard="x.tar")


@given(parts=st.lists(names, min_size=1, max_size=3), at=st.integers(0, 3), bad=st.sampled_from(["..", "a\\b", "\0"]))
def test_no_folder_leads_out_of_the_shard(parts, at, bad):
    parts.insert(min(at, len(parts) - 1), bad)
    for name in ("/".join(parts) + ".png", "/" + "/".join(parts) + ".png"):
        with pytest.raises(UnsafeMember, match="leaves the shard"):
            members.split_name(name, shard="x.tar")


@given(folder=st.lists(names, max_size=2), stem=names, extension=st.sampled_from(sorted(members.DECODERS)))
def test_key_and_extension_make_the_name(folder, stem, extension):
    name = "/".join([*folder, f"{stem}.{extension}"])
    if name[1:2] == ":":
        return
    key, got = members.split_name(name, shard="x.tar")
    assert (f"{key}.{got}", got) == (name, extension)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.png", ("a", "png")), ("x.y/a.latent.safetensors", ("x.y/a", "latent.safetensors")), ("0.JPG", ("0", "JPG"))],
)
def test_names_split_as_webdataset_splits_them(name, parts):
    assert members.split_name(name, shard="x.tar") == parts


@pytest.mark.parametrize(
    "url", ["pipe:touch /tmp/x", " PIPE:cat a.tar", "a.tar::pipe:cat b.tar", "{a.tar,pipe:cat b.tar}", "{pipe:a,b}"]
)
def test_pipe_urls_are_refused(url):
    with pytest.raises(UnsafeMember) as caught:
        members.check_url(url)
    assert caught.value.where == url


@given(
    before=st.text(" \t\n\v", max_size=3),
    pipe=st.sampled_from(["pipe:", "Pipe:", "PIPE:"]),
    command=st.text(max_size=9),
)
def test_no_spelling_hides_a_pipe(before, pipe, command):
    with pytest.raises(UnsafeMember):
        members.check_url(before + pipe + command)


@pytest.mark.parametrize("url", ["/data/shards", "s3://bucket/windpipe:2/a.tar", "pipes/a.tar", "C:/a.tar"])
def test_other_urls_pass(url):
    assert members.check_url(url) is None


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


def test_clips_and_episodes_decode():
    frames = torch.arange(48, dtype=torch.uint8).reshape(1, 4, 4, 3)
    episode = {"actions": torch.ones(5, 2), "obs.state": torch.zeros(5, 3, dtype=torch.bfloat16)}
    decoded = members.decode_sample(
        {
            "frames.safetensors": safetensors.torch.save({"frames": frames}),
            "episode.safetensors": safetensors.torch.save(episode),
            "mp4": b"\0\0\0\x18ftyp",
        }
    )
    torch.testing.assert_close(decoded["frames.safetensors"]["frames"], frames)
    torch.testing.assert_close(decoded["episode.safetensors"], episode)
    assert decoded["mp4"] == b"\0\0\0\x18ftyp"


def test_a_picture_may_stay_as_bytes_until_its_size_is_known():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(buffer, "JPEG")
    raw = {"__key__": "k", "JPG": buffer.getvalue(), "txt": b"t"}
    left = members.decode_sample(raw, as_bytes=PICTURE_SUFFIXES)
    assert left == {"__key__": "k", "jpg": buffer.getvalue(), "txt": "t"}
    pixels, size = decode.decode_at_least(members.picture_of(left), 10, 10)
    assert (pixels.shape, size) == ((10, 20, 3), (20, 40))
    np.testing.assert_array_equal(members.picture_of(members.decode_sample(raw)), decode.decode(buffer.getvalue()))


@pytest.mark.parametrize(
    ("extension", "data"),
    [
        ("json", b"{"), ("json", b"[1]"), ("json", b'{"a":' * 100_000), ("json", b'{"a": ' + b"9" * 10_000 + b"}"),
        ("png", b"no"), ("txt", b"\xff"), ("latent.safetensors", b"1"), ("frames.safetensors", b"\xff" * 99),
    ],
)  # fmt: skip
def test_a_damaged_member_is_named(extension, data):
    with pytest.raises(DataError, match=f"k.{extension}") as caught:
        members.decode_sample({"__key__": "k", "__url__": "u", extension: data})
    assert not isinstance(caught.value, UnsafeMember)
    assert caught.value.where == "u"


@pytest.mark.parametrize("extension", members.MAX_BYTES)
@pytest.mark.parametrize("as_bytes", [(), ("json", "txt")])
def test_texts_are_bounded(extension, as_bytes, monkeypatch):
    fits, too_long = b'{"a":1}', b'{"a":12}'
    monkeypatch.setitem(members.MAX_BYTES, extension, len(fits))
    members.decode_sample({"__key__": "k", extension: fits}, as_bytes=as_bytes)
    with pytest.raises(DataError, match=f"k.{extension}.*8 bytes; 7 are allowed"):
        members.decode_sample({"__key__": "k", extension: too_long}, as_bytes=as_bytes)


def test_a_json_bomb_is_not_parsed():
    with pytest.raises(DataError, match="allowed"):
        members.decode_sample({"__key__": "k", "json": b'{"a":[' + b"[]," * 6_000_000 + b"0]}"})


def test_two_members_of_one_kind_are_refused():
    with pytest.raises(DataError, match="k.TXT.*two"):
        members.decode_sample({"__key__": "k", "txt": b"a", "TXT": b"b"})


def test_a_sample_without_a_picture_is_named():
    with pytest.raises(DataError, match="'k'"):
        members.picture_of({"__key__": "k", "txt": "t"})


@pytest.mark.parametrize("captions", ["text", [1], ["a", None], {"a": "b"}])
def test_captions_that_are_no_texts_are_named(captions):
    with pytest.raises(DataError, match="'k'"):
        members.captions_of({"__key__": "k", "json": {"captions": captions}})


@pytest.mark.parametrize("captions", [None, []])
def test_without_a_list_of_captions_the_text_counts(captions):
    assert members.captions_of({"json": {"captions": captions}, "txt": "t"}) == ["t"]
    assert members.captions_of({"json": {}}) == [""]
