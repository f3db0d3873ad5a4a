"""Keys: a file only its owner reads, hashes only on the server, and no endpoint that is open by accident."""

from __future__ import annotations

import stat

import pytest

from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError, EnvironmentRefused, InputMissing
from serving import keys


def test_create_writes_a_file_only_its_owner_reads(tmp_path):
    path = tmp_path / "made" / "api_key"
    key = keys.create(path)
    assert path.read_text().strip() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.create(path) != key and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["api_key"]


def test_permits_exactly_the_known_keys():
    hashes = [keys.hash_of("one"), keys.hash_of("two")]
    assert keys.permits("one", hashes) and keys.permits("two", hashes)
    assert not any(keys.permits(key, hashes) for key in ("", "One", "one ", hashes[0]))
    assert not keys.permits("one", [])


def test_hashes_come_from_config_file_and_environment(tmp_path):
    a, b, c = (keys.hash_of(k) for k in "abc")
    file = tmp_path / "keys.sha256"
    file.write_text(f"# clients\n{b}  # the web shop\n\n")
    config = ServeConfig(key_hashes=[a], keys_file=str(file))
    assert keys.collect(config, {keys.ENVIRONMENT: f"{c}, {a}"}) == sorted([a, b, c])


def test_a_key_in_the_servers_file_is_refused_and_not_shown(tmp_path):
    file = tmp_path / "keys.sha256"
    file.write_text("lr-secret\n")
    with pytest.raises(ConfigError) as caught:
        keys.read_hashes(file)
    assert "lr-secret" not in str(caught.value)
    with pytest.raises(InputMissing):
        keys.read_hashes(tmp_path / "nothing")
    with pytest.raises(ConfigError):
        ServeConfig(key_hashes=["lr-secret"])
    with pytest.raises(ConfigError):
        keys.collect(ServeConfig(), {keys.ENVIRONMENT: "lr-secret"})


@pytest.mark.parametrize(
    ("host", "anonymous", "hashes", "allowed"),
    [
        ("127.0.0.1", False, [], False),
        ("127.0.0.1", True, [], True),
        ("::1", True, [], True),
        ("localhost", True, [], True),
        ("0.0.0.0", True, [], False),
        ("example.org", True, [], False),
        ("0.0.0.0", False, ["h"], True),
    ],
)
def test_an_endpoint_is_open_only_on_purpose_and_on_loopback(host, anonymous, hashes, allowed):
    config = ServeConfig(host=host, allow_anonymous=anonymous)
    if allowed:
        keys.require(config, hashes)
    else:
        with pytest.raises(EnvironmentRefused, match="no API key"):
            keys.require(config, hashes)
