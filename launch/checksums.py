"""Whether the files of a folder are still what was written: SHA256SUMS, which `sha256sum -c` reads as well.

The work is shared: each rank reads some of the files. Every function is collective, and answers the same on all ranks.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from launch.distributed import World

SUMS = "SHA256SUMS"
CHUNK = 1 << 20


def write_sums(folder: Path, world: World) -> None:
    """Write the digest of every file in the folder into its SHA256SUMS, when all are on the disk.

    Raises:
        FailedRankError: a file cannot be read or written.
    """
    # A shared file system shows each host its own files at once, and those of others perhaps later.
    seen = world.gather(files(folder) if world.local_rank == 0 else [])
    names = sorted(set().union(*seen))
    parts = world.attempt(lambda: {name: written_digest(folder / name) for name in share(names, world)})
    digests = {name: found for part in parts for name, found in part.items()}
    lines = "".join(f"{digests[name]}  {name}\n" for name in names)
    world.attempt_on_main(write_list, folder, lines)


def write_list(folder: Path, lines: str) -> None:
    (folder / SUMS).write_text(lines, encoding="utf-8")
    for path in (folder / SUMS, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        synchronise(path)


def written_digest(path: Path) -> str:
    synchronise(path)
    return digest(path)


def synchronise(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path, world: World) -> str | None:
    """What is wrong with the files of a folder that has a SHA256SUMS, in a few words; None: nothing."""
    expected, problem = world.broadcast(read_sums(folder) if world.is_main else None)
    found = [problem, *(damage_of(folder / name, expected[name]) for name in share(sorted(expected), world))]
    problems = [what for part in world.gather(found) for what in part if what]
    return problems[0] if problems else None


def read_sums(folder: Path) -> tuple[dict[str, str], str | None]:
    """(digest of each file, what is wrong with the list itself)"""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}, f"has no {SUMS}"
    except (OSError, UnicodeDecodeError) as error:
        return {}, f"{SUMS} cannot be read ({error})"
    expected = {name: found for found, separator, name in (line.partition("  ") for line in lines) if separator}
    unlisted = sorted(set(files(folder)) - expected.keys())
    return expected, f"{unlisted[0]} is not in {SUMS}" if unlisted else None


def share(names: list[str], world: World) -> list[str]:
    """Those that this rank reads."""
    return names[world.dp_rank :: world.size]


def damage_of(path: Path, expected: str) -> str | None:
    try:
        return None if digest(path) == expected else f"{path.name} is not what was written: its checksum differs"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"


def files(folder: Path) -> list[str]:
    """Names relative to the folder, without the checksums."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != SUMS)


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
