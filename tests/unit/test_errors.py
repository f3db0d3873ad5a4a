"""Every error says what, where and how to mend it, and arrives whole in another process."""

import pickle

import pytest

from latentray import errors
from latentray.errors import LatentrayError, RequestRefused, SampleRejected

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LatentrayError)]


def make(kind: type[LatentrayError]) -> LatentrayError:
    if kind is SampleRejected:
        return SampleRejected("too_large", "what", where="where")
    if kind is RequestRefused:
        return RequestRefused("what", param="size", code="bad_size", status=413)
    return kind("what", where="where", mend="mend")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_a_pickled_error_arrives_whole(kind):
    sent = make(kind)
    sent.add_note("seen on rank 1")
    got = pickle.loads(pickle.dumps(sent))
    assert type(got) is kind
    assert str(got) == str(sent)
    assert got.__dict__ == sent.__dict__
    assert got.args == sent.args
    assert pickle.loads(pickle.dumps(got)).__dict__ == sent.__dict__


def test_the_extra_fields_travel():
    assert pickle.loads(pickle.dumps(make(SampleRejected))).reason == "too_large"
    got = pickle.loads(pickle.dumps(make(RequestRefused)))
    assert (got.param, got.code, got.status, got.where) == ("size", "bad_size", 413, "size")


def test_the_message_leaves_out_what_is_not_known():
    assert (
        str(LatentrayError("It broke.", where="a.txt", mend="Mend it."))
        == "It broke.\n  where: a.txt\n  mend:  Mend it."
    )
    assert str(LatentrayError("It broke.")) == "It broke."


def test_every_error_has_a_scenario_in_its_docstring():
    assert len(ALL) > 10
    assert all(kind.__doc__ and len(kind.__doc__) > 30 for kind in ALL)
