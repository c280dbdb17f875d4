"""One run at a time in a folder: rank 0 holds a lock there, which the kernel releases when the process ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from launch.config import expect
from launch.distributed import World

LOCK_FILE = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[Path, IO[str]] = {}


def hold(folder: Path, world: World) -> None:
    """Make the folder and hold its lock until ``release``; collective.

    Raises:
        ConfigError: another run holds it, or the folder cannot be written.
    """
    problem = world.attempt_on_main(_try_to_hold, folder)
    expect(problem is None, f"output_dir={str(folder)!r} {problem}")


def release() -> None:
    while _held:
        _held.popitem()[1].close()


def _try_to_hold(folder: Path) -> str | None:
    """What is wrong, in a few words; None: this process has the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        resolved = folder.resolve()
        if resolved in _held:
            return None
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except (FileExistsError, NotADirectoryError):
        return "is a file, or below one: expected a folder. Choose another"
    except OSError as error:
        return f"cannot be written ({error.strerror}): choose another folder, or make it writable"
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        file.seek(0)
        holder = _described(file.read())
        file.close()
        return f"is in use by another run ({holder}): choose another folder, or end that run"
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            file.close()
            return f"cannot be locked ({error.strerror}): choose another folder"
        print(f"warning: {folder} is on a file system without locks: start no second run there", flush=True)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    try:
        file.truncate(0)
        file.write(json.dumps(me) + "\n")
        file.flush()
    except OSError as error:
        file.close()
        return f"cannot be written ({error.strerror}): free some space, or choose another folder"
    _held[resolved] = file
    return None


def _described(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"host {holder['host']}, pid {holder['pid']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "which has not yet told its name"
