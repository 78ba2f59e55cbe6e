"""What gloo is told before the first group is made."""

import resource
import socket

import psutil
import pytest

from megagpt.parallel import network
from megagpt.parallel.network import interface_towards, prepare_network


@pytest.fixture(autouse=True)
def limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def outer_address():
    """(interface, address) of this host that is not its loopback, if it has one."""
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return name, each.address
    return None


def test_files_are_raised_to_the_hard_limit_and_what_is_set_stays(limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
    environment = {"TORCH_GLOO_LAZY_INIT": "0", "GLOO_SOCKET_IFNAME": "ib0", "MASTER_ADDR": "far"}
    environment |= {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    before = dict(environment)
    prepare_network(environment)
    assert environment == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit[1], limit[1])


@pytest.mark.parametrize(
    ("local", "interface"),
    [({"LOCAL_WORLD_SIZE": "8"}, None), ({"LOCAL_SIZE": "4"}, "eth7"), ({}, "eth7")],
)
def test_the_interface_is_looked_for_where_ranks_are_on_other_hosts(local, interface, monkeypatch):
    monkeypatch.setattr(network, "interface_towards", lambda host: {"node1": "eth7"}[host])
    environment = {"MASTER_ADDR": "node1", "WORLD_SIZE": "8", **local}
    prepare_network(environment)
    assert environment.get("GLOO_SOCKET_IFNAME") == interface
    assert environment["TORCH_GLOO_LAZY_INIT"] == "1"


def test_the_interface_towards_an_address():
    if outer_address() is None:
        pytest.skip("this host has no address but its loopback")
    name, address = outer_address()
    assert interface_towards(address) == name
    assert interface_towards("127.0.0.1") is None  # no other host comes that way
    assert interface_towards("no.such.host.invalid") is None
