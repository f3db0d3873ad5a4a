"""API keys: made for a client, known to the server only by their sha256.

A key is 32 random bytes, so one round of sha256 is enough: there is nothing to guess, unlike with a password.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from latentray.checkpoint import store
from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError, EnvironmentRefused

PREFIX = "lr-"
ENVIRONMENT = "LATENTRAY_KEY_HASHES"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def create(path: str | Path) -> str:
    """Make a key, write it to a client's file (mode 0600, replacing what was there) and return it."""
    key = PREFIX + secrets.token_urlsafe(32)
    target = store.local_path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(key + "\n")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return key


def hash_of(key: str) -> str:
    """The sha256 of a key as hex: what the server keeps."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def permits(key: str, hashes: Iterable[str]) -> bool:
    """Whether a presented key is one of those known; compares with each, in constant time."""
    presented = hash_of(key)
    found = False
    for known in hashes:
        found |= hmac.compare_digest(presented, known)
    return found


def read_hashes(uri: str | Path) -> list[str]:
    """The hashes in a keys file. Raises InputMissing, or ConfigError for a line that is no sha256 (not shown)."""
    hashes = []
    for number, line in enumerate(store.read_bytes(uri).decode("utf-8", "replace").splitlines(), start=1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        if not _SHA256.fullmatch(text):
            raise ConfigError(
                f"Line {number} is no sha256 of a key (64 hex digits).",
                where=str(uri),
                mend="The server's file holds hashes, not keys: printf %s KEY | sha256sum.",
            )
        hashes.append(text)
    return hashes


def collect(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> list[str]:
    """All hashes the endpoint accepts: of the config, of `keys_file` and of $LATENTRAY_KEY_HASHES, sorted."""
    hashes = set(config.key_hashes)
    if config.keys_file:
        hashes |= set(read_hashes(config.keys_file))
    for text in filter(None, (part.strip() for part in environment.get(ENVIRONMENT, "").split(","))):
        if not _SHA256.fullmatch(text):
            raise ConfigError(
                "An entry is no sha256 of a key (64 hex digits).", where=f"${ENVIRONMENT}", mend="Give hashes."
            )
        hashes.add(text)
    return sorted(hashes)


def require(config: ServeConfig, hashes: list[str]) -> None:
    """Refuse an endpoint that anyone could use: no key, unless bound to loopback with `allow_anonymous=true`."""
    if hashes:
        return
    if config.allow_anonymous and is_loopback(config.host):
        return
    what = "The endpoint has no API key."
    if config.allow_anonymous:
        what = f"The endpoint has no API key, and host={config.host} is reachable from other machines."
    raise EnvironmentRefused(
        what,
        where="keys_file, key_hashes",
        mend="Set keys_file=<file with sha256 of keys>; on this machine alone, host=127.0.0.1 allow_anonymous=true.",
    )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
