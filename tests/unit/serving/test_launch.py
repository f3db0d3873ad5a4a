"""What is said where an endpoint does not start."""

import pytest

from serving.launch import cause_of

TRACEBACK = (
    "The deployment failed to start 3 times in a row.\nTraceback (most recent call last):\n  File x\nKeyError: 'a'"
)


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        (["", TRACEBACK.replace("KeyError", "a.DigestMismatch"), "Failed to update"], "a.DigestMismatch: 'a'"),
        (["Failed to update the deployments", TRACEBACK], "KeyError: 'a'"),
        (["", "Failed to update the deployments ['Sampler']."], "Failed to update the deployments ['Sampler']."),
        (["", ""], ""),
    ],
)  # fmt: skip
def test_the_error_itself_is_named_not_its_traceback(messages, cause):
    assert cause_of(messages) == cause
