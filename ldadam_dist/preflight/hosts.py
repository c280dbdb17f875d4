"""What hosts find out about each other before any collective: open ports, and whether they share the output folder."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

CONNECT_SECONDS = 5.0
_SEEN_WITHIN = 3.0
"""Seconds after which a file of another host must be seen; network file systems may remember that it was not there."""


@contextmanager
def listener(address: str | None) -> Iterator[int | None]:
    """A port of this host's address, any free one, on which it can be reached as a rank is; None without an address."""
    if address is None:
        yield None
        return
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=1024) as server:
        yield int(server.getsockname()[1])


def unreachable(targets: Mapping[int, tuple[str, int]]) -> dict[int, str]:
    """The hosts to which no connection could be made, and why.

    Args:
        targets: address and port of each, by the number of its first rank.
    """
    failed = {}
    for host, (address, port) in targets.items():
        try:
            socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            failed[host] = f"{address}:{port}: {error}"
    return failed


@contextmanager
def shown_file(folder: Path) -> Iterator[str | None]:
    """Name of a new file in the folder, which the other hosts look for; None if it cannot be written."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-shared-"))
        except OSError:
            yield None
        else:
            yield Path(file.name).name


def sees(folder: Path, name: str) -> bool:
    """Whether the file appears in the folder in time."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            if name in {path.name for path in folder.iterdir()}:  # asks the server, where looking one up may not
                return True
        except OSError:
            return False
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
