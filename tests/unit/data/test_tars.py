"""Walking tars: every format's members at their places, and no damage that ends in silence."""

import collections
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import tars
from latentray.errors import DataError, SampleRejected, UnsafeMember

LONG = "folder/" + "k" * 120


def tar_of(members, format=tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def samples(tar: bytes, skipped=None) -> list[tars.Grouped]:
    return list(tars.samples(tar, shard="x.tar", skipped=collections.Counter() if skipped is None else skipped))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(deadline=None)
@given(contents=st.lists(st.binary(max_size=1100), min_size=1, max_size=6))
def test_members_lie_where_tarfile_finds_them(format, contents):
    tar = tar_of(
        [(f"{i}{LONG[: 90 if format == tarfile.USTAR_FORMAT else None]}.txt", data) for i, data in enumerate(contents)],
        format,
    )
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        expected = opened.getmembers()
    found = list(tars.walk(tar))
    assert [(m.name, m.start, m.data, m.size) for m in found] == [
        (m.name, m.offset, m.offset_data, m.size) for m in expected
    ]
    assert [tar[m.data : m.data + m.size] for m in found] == contents


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_samples_range_begins_with_its_extension_headers_and_reads_alone(format):
    members = [(f"{LONG}{i}.{ext}", f"{ext} {i}".encode()) for i in range(3) for ext in ("JPG", "txt")]
    tar = tar_of(members, format)
    found = samples(tar)
    assert [one.key for one in found] == [f"{LONG}{i}" for i in range(3)]
    assert found[1].offset == found[0].offset + found[0].length
    for i, one in enumerate(found):
        stretch = tar[one.offset : one.offset + one.length]
        assert tars.contents(stretch, shard="x.tar") == (
            one.key,
            {"jpg": f"JPG {i}".encode(), "txt": f"txt {i}".encode()},
        )


def test_links_and_folders_carry_nothing_and_other_members_are_counted():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("a.jpg", None),
            ("a.npy", None),
            ("._a.jpg", None),
            ("l.txt", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind or tarfile.REGTYPE, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            info.size = 0 if kind else 3
            tar.addfile(info, io.BytesIO(b"abc"))
    skipped = collections.Counter()
    (one,) = samples(buffer.getvalue(), skipped)
    assert (one.key, list(one.places)) == ("a", ["jpg"])
    assert skipped == {".npy": 1, "._a.jpg": 1}


@pytest.mark.parametrize("name", ["a.pyd", "a.jpg.pkl", "a.pkl.gz", "../a.jpg", "/a.jpg", "a/../../b.cls"])
def test_members_that_could_do_harm_end_the_job(name):
    with pytest.raises(UnsafeMember):
        samples(tar_of([("0.jpg", b"x"), (name, b"x")]))


def test_members_of_a_sample_apart_are_refused_by_key():
    for names in (("a.jpg", "b.jpg", "a.txt"), ("a.jpg", "a.txt", "a.jpg", "a.txt")):
        with pytest.raises(DataError, match="'a'") as caught:
            samples(tar_of([(name, b"x") for name in names]))
        assert "--sort=name" in caught.value.mend


def damaged(tar: bytes) -> tuple[list[str], str]:
    """Keys of the samples before the damage, and what is said of it."""
    found = []
    with pytest.raises(SampleRejected) as caught:  # noqa: PT012
        for one in tars.samples(tar, shard="x.tar", skipped=collections.Counter()):
            found.append(one.key)
    assert caught.value.reason == "damaged_tar"
    return found, caught.value.what


def test_each_kind_of_damage_is_told_with_what_came_before_it():
    whole = tar_of([(f"{i}.{ext}", bytes(600)) for i in range(5) for ext in ("jpg", "txt")])
    third = samples(whole)[3].offset
    flipped = bytearray(whole)
    flipped[third + 3] ^= 1
    before = ["0", "1"]  # the sample before the damage may lack a member: it is lost too
    assert damaged(bytes(flipped)) == (before, f"The tar is damaged: the header at byte {third}: bad checksum.")
    assert damaged(whole[:third])[0] == before
    assert "without an end marker" in damaged(whole[:third])[1]
    assert "cut inside" in damaged(whole[: third + 700])[1]
    assert "the header" in damaged(whole[: third + 100])[1]
    assert "behind its end marker" in damaged(whole + whole)[1]
    zeroed = whole[:third] + bytes(512) + whole[third + 512 :]
    assert "behind its end marker" in damaged(zeroed)[1]
    assert damaged(b"no tar" * 200)[0] == []


@settings(deadline=None)
@given(st.data())
def test_no_flipped_header_byte_passes_unnoticed(data):
    whole = tar_of([(f"{i}.{ext}", bytes([i]) * 10) for i in range(3) for ext in ("jpg", "txt")])
    header = data.draw(st.integers(0, 5)) * 1024
    flipped = bytearray(whole)
    flipped[header + data.draw(st.integers(0, 511))] ^= 1 << data.draw(st.integers(0, 6))
    if bytes(flipped[header : header + 512]) != whole[header : header + 512]:
        try:
            found = samples(bytes(flipped))
        except (SampleRejected, DataError):
            return
        assert found == samples(whole)  # a flip within the checksum's own padding says the same
