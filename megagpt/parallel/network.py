"""What gloo needs of this process before the first group is made, beside NCCL too.

NCCL finds interfaces by itself and connects late; gloo, over which checkpoints are agreed on, does
neither unless it is told. Knows no groups. Next file: `groups.py`.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Mapping, MutableMapping

import psutil

_INTERFACE = "GLOO_SOCKET_IFNAME"


def prepare_network(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what is not set already, and raises the limit of open files as far as it goes.

    A rank of gloo holds a connection to each other one, unless it connects when it first sends; and
    rank 0 holds them all the same. It takes the interface of the host's own name, which Debian and
    Ubuntu make 127.0.1.1.
    """
    environment.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if _INTERFACE not in environment and _spans_hosts(environment):
        if interface := interface_towards(environment["MASTER_ADDR"]):
            environment[_INTERFACE] = interface


def _spans_hosts(environment: Mapping[str, str]) -> bool:
    """Whether there are ranks on other hosts; torchrun and DeepSpeed name the local ones apart."""
    local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "0"
    return "MASTER_ADDR" in environment and int(local) < int(environment.get("WORLD_SIZE", "1"))


def interface_towards(host: str) -> str | None:
    """The network interface from which packets leave for a host; None where none can be told."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        # The master reaches itself by the address that others reach it by, on that interface.
        if any(each.address.split("%")[0] == own for each in addresses):
            return None if own.startswith("127.") else name
    return None
