"""Free ports: different ones, and nobody's."""

import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from cluster import ports
from library.errors import PrismError


def test_free_ports_can_all_be_had_at_once():
    found = ports.free_ports(20)
    assert len(set(found)) == 20
    with ExitStack() as stack:
        for port in found:
            stack.enter_context(socket.socket()).bind(("127.0.0.1", port))


def test_a_port_that_somebody_has_is_not_free(monkeypatch):
    two = sorted(ports.free_ports(2))
    monkeypatch.setattr(ports, "OFFERED", two)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", two[0]))
        assert ports.free_port() == two[1]
        with pytest.raises(PrismError, match=f"1 of the ports {two[0]} to {two[1]} are free; 2 are needed"):
            ports.free_ports(2)


HOLDER = """
from cluster import ports
ports.RANGES = range({first}, {last}, 20)
print([ports.claim_range() for _ in range(3)], flush=True)
input()
"""


def test_a_range_belongs_to_one_process_while_that_lives(monkeypatch):
    first = next(port for port in ports.OFFERED if all(map(_is_free, (port, port + 20))))
    two = range(first, first + 40, 20)
    command = [sys.executable, "-c", HOLDER.format(first=first, last=first + 40)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        said = other.stdout.readline()
        assert all(str(range(start + 1, start + 20)) in said for start in two)
        assert "None" in said  # a third is not there
        monkeypatch.setattr(ports, "RANGES", two)
        monkeypatch.setattr(ports, "_claims", [])
        assert ports.claim_range() is None
        other.communicate("\n")
    claimed = ports.claim_range()
    assert claimed in [range(start + 1, start + 20) for start in two]
    assert all(map(_is_free, claimed))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
