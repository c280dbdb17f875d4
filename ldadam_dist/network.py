"""How this machine reaches another one: from which address, through which interface, and whether it is the other one.

Asked of the kernel's routes, not of names: a host often knows its own name as 127.0.1.1, and two may have the same.
Runs as a file too, without torch: python network.py HOST prints the address, and 1 or 0 for "is this machine".
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


def route(host: str) -> tuple[str, str]:
    """(the address of `host`, the address of this machine from which packets go there); sends nothing.

    Raises:
        OSError: the name is not known here, or there is no route.
    """
    family, _, _, _, remote = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(remote)
        return str(remote[0]), str(probe.getsockname()[0])


def is_this_machine(host: str) -> bool:
    """Whether packets to `host` stay here; of a loopback address too."""
    remote, local = route(host)
    return remote == local or is_loopback(remote)


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """Name of the interface with this IPv4 address as its first; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def choose_interface() -> None:
    """Have gloo use the interface that leads to MASTER_ADDR, unless GLOO_SOCKET_IFNAME names one.

    By itself gloo takes the one of the machine's own name, which may be loopback. Call before `init_process_group`;
    does nothing without MASTER_ADDR, and for processes of one machine that meet at its loopback address.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    try:
        _, local = route(os.environ["MASTER_ADDR"])
    except OSError:  # joining will fail, and says more
        return
    name = None if is_loopback(local) else interface_of(local)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


if __name__ == "__main__":
    sys.stdout.write(f"{route(sys.argv[1])[1]} {int(is_this_machine(sys.argv[1]))}\n")
