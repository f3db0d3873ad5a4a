"""What keeps the machines of `test_two_nodes.py` apart: Python imports this file at its start, in every process.

All machines of that test are folders below one base folder. $LATENTRAY_TEST_GUARD (JSON) says which of them this process
runs on; an audit hook then fails, and records, each access to

- a path below the base folder that is not this machine's: a file that another machine made;
- a path anywhere else that is opened for writing: a file that another machine could read.

Hooks see what goes through Python (`open`, `os.*`, `shutil`); native readers of pyarrow and safetensors open files by
themselves, yet only files that Python code fetched or wrote before.
"""

import json
import os
import sys
import threading

_PATHS = {
    "open": (0,),
    "os.listdir": (0,),
    "os.scandir": (0,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.rename": (0, 1),
    "os.link": (0, 1),
    "os.symlink": (0, 1),
    "shutil.copyfile": (0, 1),
    "shutil.copytree": (0, 1),
    "shutil.move": (0, 1),
    "shutil.rmtree": (0,),
}
"""Audit event -> positions of the paths in its arguments."""
_WATCHED = {"latentray.data.shard_building", "latentray.data.precompute", "latentray.training.loop", "serving.loading"}
"""Imports that are recorded: they prove that the hook was at work in the processes that did the pipeline's work."""
_DEVICES = ("/dev/", "/proc/", "/sys/")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class ForeignFile(RuntimeError):
    """A process touched a file of another machine. No OSError: nobody may take it for a missing file, or try again."""


def _install(name: str, base: str, allowed: tuple[str, ...], record: str) -> None:
    recording = threading.local()

    def note(**facts: object) -> None:
        recording.on = True
        try:
            with open(record, "a", encoding="utf-8") as file:
                file.write(json.dumps({"machine": name, "pid": os.getpid(), **facts}) + "\n")
        finally:
            recording.on = False

    def check(event: str, path: object, flags: int) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a file descriptor
        where = os.path.abspath(os.fsdecode(path))
        if any(where == a or where.startswith(a + "/") for a in allowed):
            return
        inside = where.startswith(base + "/")
        if inside or (flags & _WRITES and not where.startswith(_DEVICES)):
            note(violation=event, path=where)
            raise ForeignFile(f"a process of machine {name} touched {where} ({event})")

    def hook(event: str, args: tuple) -> None:
        if event not in _PATHS and event != "import":
            return
        if getattr(recording, "on", False):
            return
        if event == "import":
            if args[0] in _WATCHED:
                note(imported=args[0])
            return
        flags = args[2] if event == "open" and isinstance(args[2], int) else 0
        for position in _PATHS[event]:
            check(event, args[position], flags)

    sys.addaudithook(hook)


_settings = os.environ.get("LATENTRAY_TEST_GUARD")
if _settings:
    _guard = json.loads(_settings)
    _install(_guard["name"], _guard["base"], tuple(_guard["allowed"]), _guard["record"])
