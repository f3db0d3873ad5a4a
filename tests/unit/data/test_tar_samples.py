"""What a tar's sample says, and reading samples of a tar by their places."""

import io
import tarfile

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.data import decode, tar_samples
from latentray.errors import SampleRejected


def sample(**contents) -> tar_samples.TarSample:
    return tar_samples.TarSample(name="0.tar/a", key="a", contents=contents)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({"json": b'{"captions": ["a", "b"], "caption": "c"}', "txt": b"t"}, ["a", "b"]),
        ({"json": b'{"caption": "c"}', "txt": b" t \n"}, ["t"]),
        ({"json": b'{"caption": "c", "captions": []}'}, ["c"]),
        ({"json": b"[1]", "txt": b"\xe9t\xe9"}, ["\ufffdt\ufffd"]),
    ],
)
def test_captions_come_from_json_or_text(contents, expected):
    one = sample(**contents)
    assert one.captions(one.metadata()) == expected


def test_what_is_missing_has_its_reason():
    for reason, call in (
        ("no_picture", lambda: sample(txt=b"x").picture()),
        ("missing_caption", lambda: sample(txt=b" ").captions({})),
        ("unreadable_json", lambda: sample(json=b"\xff").metadata()),
    ):
        with pytest.raises(SampleRejected) as caught:
            call()
        assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_headers_size_is_that_of_the_decoded_picture(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, kind, exif=exif)
    height, width = decode.decode(buffer.getvalue()).shape[:2]
    assert tar_samples.size_of(buffer.getvalue(), max_pixels=200, where="") == (width, height)
    with pytest.raises(SampleRejected, match="pixels"):
        tar_samples.size_of(buffer.getvalue(), max_pixels=199, where="")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400_000), st.integers(512, 20_000_000)), min_size=1, max_size=30))
def test_reads_are_few_bounded_and_lose_no_place(gaps_and_lengths):
    places, at = [], 0
    for gap, length in gaps_and_lengths:
        places.append((at + gap, length, 0))
        at += gap + length
    found = list(tar_samples.runs(places))
    assert [place for run in found for place in run] == places
    for run in found:
        assert len(run) == 1 or run[-1][0] + run[-1][1] - run[0][0] <= 32 << 20


def test_a_tar_that_changed_meanwhile_gives_no_wrong_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    data = bytearray((tmp_path / "0.tar").read_bytes())
    places = [(at, 1024, google_crc32c.value(bytes(data[at : at + 1024]))) for at in (0, 1024)]
    data[512] ^= 1
    (tmp_path / "0.tar").write_bytes(data)
    changed, whole = tar_samples.read(str(tmp_path / "0.tar"), "0.tar", places)
    assert (changed.reason, whole.name, whole.contents) == ("changed", "0.tar/b", {"txt": b"x"})
