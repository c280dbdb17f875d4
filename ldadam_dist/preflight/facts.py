"""What a rank knows about itself and its machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import ldadam_dist
from ldadam_dist.network import route

_LIBRARIES = ("deepspeed", "transformers", "accelerate", "numpy")


@dataclass(frozen=True)
class Place:
    """A process among those that a launcher started; its only one where there is no launcher."""

    number: int
    size: int
    local_number: int
    master: tuple[str, int] | None  # address and port; None without a launcher

    @classmethod
    def from_environment(cls) -> Place:
        """From the variables that torchrun and the deepspeed launcher set; others must set the same.

        Raises:
            ValueError: some of them are missing.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if len(missing) == len(names) or missing == ["RANK", "WORLD_SIZE"]:
            return cls(0, 1, 0, None)
        if missing:
            raise ValueError(
                f"{', '.join(missing)} not set, but {', '.join(n for n in names if n in os.environ)} is: expected all "
                "of them, as torchrun and deepspeed set them, or none for one process."
            )
        number, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        return cls(number, size, int(os.environ.get("LOCAL_RANK", 0)), (os.environ["MASTER_ADDR"], port))

    @property
    def leads_host(self) -> bool:
        """The first rank of its host, which answers for it."""
        return self.local_number == 0


@dataclass
class Facts:
    """One rank's report."""

    number: int
    leads_host: bool
    host: str
    versions: dict[str, str]
    device: str
    address: str | None  # of its host, towards MASTER_ADDR; None without a launcher
    port: int | None  # where it listens for the other hosts
    folder_error: str | None = None
    free_bytes: int = 0


def look(place: Place, folder: Path, address: str | None, port: int | None) -> Facts:
    """This rank's facts; the first rank of a host tries the output folder too."""
    device = device_name(place.local_number)
    facts = Facts(place.number, place.leads_host, socket.gethostname(), versions(), device, address, port)
    if place.leads_host:
        facts.folder_error, facts.free_bytes = try_folder(folder)
    return facts


def own_address(place: Place) -> str | None:
    """The one of this host towards MASTER_ADDR; None without a launcher."""
    return route(place.master[0])[1] if place.master else None


def versions() -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ldadam_dist": f"{ldadam_dist.__version__} ({source_digest()})",
        "device type": "cuda" if torch.cuda.is_available() else "cpu",
    }
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def source_digest() -> str:
    """Eight digits of a hash of this package's files: hosts may have copies of different ages."""
    digest, folder = hashlib.sha256(), Path(ldadam_dist.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def device_name(local_number: int) -> str:
    if not torch.cuda.is_available():
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    if local_number >= torch.cuda.device_count():
        return f"none: {torch.cuda.device_count()} CUDA device(s) here, expected at least {local_number + 1}"
    return str(torch.cuda.get_device_name(local_number))


def try_folder(folder: Path) -> tuple[str | None, int]:
    """(why nothing can be written there, or None; free bytes). The folder is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as file:
            file.write(b"preflight")
            file.flush()
        return None, shutil.disk_usage(folder).free
    except OSError as error:
        return str(error), 0
