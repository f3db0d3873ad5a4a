"""Bodies with files: forms as other clients write them, read back byte for byte; damaged ones refused."""

from __future__ import annotations

import base64

import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.errors import RequestRefused
from serving import forms
from serving.schema import EditsRequest

FILES = ("image", "mask")
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


def written(data: dict, files) -> tuple[bytes, str]:
    """A form by httpx, as OpenAI's client sends it: body and boundary."""
    request = httpx.Request("POST", "http://x", data=data, files=files)
    return request.read(), request.headers["content-type"].partition("boundary=")[2]


def read(body: bytes, boundary: str | None) -> dict[str, str]:
    return forms.fields(body, boundary, files=FILES)


@settings(max_examples=60)
@given(image=st.binary(max_size=200), mask=st.binary(max_size=50), prompt=TEXT, user=TEXT)
def test_what_another_client_writes_is_read_byte_for_byte(image, mask, prompt, user):
    found = read(*written({"prompt": prompt, "user": user}, {"image": ("a.png", image), "mask": ("b.png", mask)}))
    assert {name: base64.b64decode(found.pop(name)) for name in FILES} == {"image": image, "mask": mask}
    assert found == {"prompt": prompt, "user": user}


@pytest.mark.parametrize("content", [b"", b"\r\n", b"\r\n\r\n", b"\r\n--", b"\r\n--c\r\n", b"\x00\xff--b--"])
def test_line_ends_and_dashes_of_a_file_stay(content):
    body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + content + b"\r\n--b--\r\n"
    assert base64.b64decode(read(body, "b")["image"]) == content


def test_a_list_of_one_and_a_name_in_any_script_are_understood():
    body, boundary = written({}, [("image[]", ("фото.png", b"abc"))])
    assert read(body, boundary) == {"image": base64.b64encode(b"abc").decode()}


def test_a_form_cut_off_anywhere_is_refused():
    body, boundary = written({"prompt": "x"}, {"image": ("a.png", b"\x89PNG\r\n")})
    whole = body.rindex(b"--") + 2
    for end in range(whole):
        with pytest.raises(RequestRefused) as caught:
            read(body[:end], boundary)
        assert caught.value.status == 400
    assert read(body[:whole], boundary)["prompt"] == "x"


@pytest.mark.parametrize(
    ("body", "boundary", "param"),
    [
        (b"", None, None),
        (b"--b--", "", None),
        (b"--b\r\n\r\nx\r\n--b--", "b", None),
        (b"--b x\r\nA: b\r\n\r\nx\r\n--b--", "b", None),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", "b", None),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--b--', "b", "prompt"),
        (b'--b\r\nContent-Disposition: form-data; name="prompt"; filename="x"\r\n\r\nx\r\n--b--', "b", "prompt"),
        (b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n' * 2 + b"--b--", "b", "n"),
        (b'--b\r\nContent-Disposition: form-data; name="image[]"; filename="x"\r\n\r\nx\r\n' * 2 + b"--b--", "b", "image"),
        (b"".join(b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n1\r\n' % i for i in range(70)) + b"--b--", "b", None),
    ],
)  # fmt: skip
def test_damaged_forms_are_refused(body, boundary, param):
    with pytest.raises(RequestRefused) as caught:
        read(body, boundary)
    assert caught.value.param == param and caught.value.status == 400


@settings(max_examples=200)
@given(body=st.binary(max_size=120) | st.text('b-\r\n:;=" namecontent-disposition', max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(body):
    try:
        read(b"--b\r\n" + body + b"\r\n--b--", "b")
    except RequestRefused as refusal:
        assert refusal.status == 400


def test_the_texts_of_a_form_become_what_the_request_says():
    data = {
        "prompt": "5",
        "n": 2,
        "seed": 2**53 - 1,
        "guidance_scale": 2.5,
        "strength": 1,
        "label": "tench",
        "stream": "false",
    }
    body, boundary = written(data, {"image": ("a.png", b"abc")})
    request = forms.parse(EditsRequest, body, f"multipart/form-data; boundary={boundary}", files=FILES)
    assert (request.prompt, request.n, request.seed, request.stream) == ("5", 2, 2**53 - 1, False)
    assert (request.guidance_scale, request.strength, request.label) == (2.5, 1.0, "tench")
    assert request.image == base64.b64encode(b"abc").decode() and request.mask is None


@pytest.mark.parametrize(
    ("body", "content_type", "loc"),
    [
        (b"{", "application/json", ("body",)),
        (b"[]", "application/json", ("body",)),
        (b"{}", "application/json; charset=utf-8", ("body", "image")),
        (b'{"image": "", "n": "2"}', "application/json", ("body", "n")),
        (b'--b\r\nContent-Disposition: form-data; name="n"\r\n\r\nx\r\n--b--', "multipart/form-data; boundary=b", ("body", "n")),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_request_is_told_as_any_route_tells_it(body, content_type, loc):
    with pytest.raises(RequestValidationError) as caught:
        forms.parse(EditsRequest, body, content_type, files=FILES)
    assert caught.value.errors()[0]["loc"] == loc


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "nonsense"])
def test_other_bodies_are_refused(content_type):
    with pytest.raises(RequestRefused, match="multipart/form-data"):
        forms.parse(EditsRequest, b"image=a", content_type, files=FILES)
