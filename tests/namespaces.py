"""Hosts on one machine: processes with their own network, processes, mounts and host name, and a bridge between them.

Nothing of them is in the machine's own network, and nothing outlives the process that made them: a host's first process
reads from a pipe, ends when the pipe does and takes the others with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("host-a", "host-b")
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
LIMIT = 60
"""Seconds for a command that sets something up."""


class UnavailableError(Exception):
    """This machine cannot do it, and why."""


@dataclass
class Host:
    """A process, the first of its namespaces; all others there end with it."""

    name: str
    holder: subprocess.Popen[bytes]
    keep: set[int] = field(default_factory=set)  # of its processes, those that outlive `kill`

    @property
    def init(self) -> int:
        """Its first process."""
        return int(Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text().split()[0])

    def command(self, *arguments: object) -> list[str]:
        return ["nsenter", "--target", str(self.init), "--net", "--mount", "--uts", "--pid", *map(str, arguments)]

    def run(self, *arguments: object) -> None:
        call(self.command(*arguments))

    def processes(self) -> dict[int, str]:
        """Command lines of all but the first, without those that have ended."""
        inside = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line and os.readlink(folder / "ns" / "pid") == inside:
                    found[int(folder.name)] = line
        found.pop(self.init, None)
        return found

    def kill(self) -> None:
        """kill -9 for every process of the host."""
        for pid in self.processes().keys() - self.keep:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        with self.holder:  # whose end closes its other pipes
            assert self.holder.stdin
            self.holder.stdin.close()
            try:
                self.holder.wait(10)
            except subprocess.TimeoutExpired:
                self.holder.kill()


def call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise UnavailableError(f"`{' '.join(command)}`: {done.stderr.strip() or f'exit code {done.returncode}'}")


def start_host(name: str, folder: Path) -> Host:
    """A host with the files of /etc that it needs, as Debian has them: its own name is 127.0.1.1."""
    others = "".join(f"{address} {other}\n" for other, address in ADDRESSES.items() if other != name)
    (folder / f"hosts-{name}").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
    (folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")  # not locked, no password
    setup = (
        f"hostname {name} && mount --bind {folder}/hosts-{name} /etc/hosts && mount --bind {folder}/shadow /etc/shadow "
        "&& mount -t tmpfs tmpfs /run && mkdir /run/sshd && ip link set lo up && echo ready && exec cat"
    )
    unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", setup]
    holder = subprocess.Popen(unshare, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert holder.stdout
    assert holder.stderr
    if holder.stdout.readline() != b"ready\n":
        with holder:
            reason = holder.stderr.read().decode().strip()
        raise UnavailableError(f"namespaces are not allowed here: {reason}")
    return Host(name, holder)


@dataclass
class Network:
    """Two hosts and the bridge between them, and a host that has no link."""

    switch: Host
    alone: Host
    hosts: list[Host]

    def cut(self, name: str) -> None:
        """As if the cable of a host were pulled at the switch."""
        self.switch.run("ip", "link", "set", f"to-{name}", "down")

    def restore(self, name: str) -> None:
        self.switch.run("ip", "link", "set", f"to-{name}", "up")


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    if os.geteuid() != 0:
        raise UnavailableError("needs root, to make network namespaces: sudo")
    for program, package in {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}.items():
        if not shutil.which(program):
            raise UnavailableError(f"{program} is not installed: apt-get install {package}")
    with contextlib.ExitStack() as stack:
        hosts = []
        for name in ("switch", "alone", *NAMES):
            hosts.append(start_host(name, folder))
            stack.callback(hosts[-1].close)
        switch, alone, *hosts = hosts
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        for host in hosts:
            port = f"to-{host.name}"
            # Made in the switch's network; the other end is moved by the number of the host's process as all see it.
            outside = ["nsenter", "--target", str(switch.init), "--net"]
            call([*outside, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.init)])
            switch.run("ip", "link", "set", port, "master", "bridge", "up")
            host.run("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        yield Network(switch, alone, hosts)
