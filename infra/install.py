"""Installs the project into the virtual environment that runs this file: `python infra/install.py ".[train]"`.

uv does in a quarter of the time what pip does, so it is asked first. It does not read pip's configuration, and a company
that serves its packages from a mirror of its own has put that mirror into pip's: so pip's settings are handed to it. Where
uv cannot be had, or fails, pip installs, and says why itself if it fails too.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping

CONSTRAINTS = "constraints.txt"
UV_SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
"""pip's settings that say where packages come from, and uv's variable of the same meaning."""
SECTIONS = ("global", "install", ":env:")
"""Where pip looks for its settings; a later one wins."""
LISTS_BY_COMMAS = ("find-links",)
"""What uv separates by commas; pip separates every list by white space."""


def pip_settings(listing: str) -> dict[str, str]:
    """The settings in the output of `pip config list`, by their option's name."""
    found: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if equals and section in found:
            found[section][option] = str(ast.literal_eval(value))
    return {option: value for section in SECTIONS for option, value in found[section].items()}


def uv_environment(settings: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with pip's settings in uv's variables. What the user has set for uv stays."""
    made = {
        UV_SETTINGS[option]: (",".join(value.split()) if option in LISTS_BY_COMMAS else " ".join(value.split()))
        for option, value in settings.items()
        if option in UV_SETTINGS and value.strip()
    }
    # pip takes the best version of all its indexes; uv by itself the first index that knows the name.
    made["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    # Byte code is made where it is imported, which most of the installed files never are.
    made["UV_COMPILE_BYTECODE"] = "0"
    return {**made, **environ}


def main(requirement: str) -> int:
    """Installs `requirement`, editable, with the constraints. Returns the installer's exit code."""
    pip = [sys.executable, "-m", "pip"]
    listing = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=False).stdout
    target = ["--constraint", CONSTRAINTS, "--editable", requirement]
    if uv_installed(pip):
        command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, *target]
        if subprocess.run(command, env=uv_environment(pip_settings(listing), os.environ), check=False).returncode == 0:
            return 0
        print("uv could not install; pip tries", file=sys.stderr)
    return subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", "--prefer-binary", *target], check=False
    ).returncode


def uv_installed(pip: list[str]) -> bool:
    """Puts uv into the environment. False where the index has none for this machine."""
    command = [*pip, "install", "--quiet", "--only-binary", "uv", "--constraint", CONSTRAINTS, "uv"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
