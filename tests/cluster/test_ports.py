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


OWN = "from cluster import ports; ports.RANGES = {ranges}; print(ports.own_range(), flush=True); input()"


def test_a_range_belongs_to_one_process_while_that_lives():
    first, second = sorted(ports.free_ports(2))
    command = [sys.executable, "-c", OWN.format(ranges=range(first, second + 1, second - first))]
    with ExitStack() as stack:
        others = []
        for _ in range(3):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            others.append(stack.enter_context(process))
            stack.callback(process.communicate, "\n")
        said = sorted(process.stdout.readline().strip() for process in others)
    span = second - first
    assert said == sorted(["None", *(str(range(start + 1, start + span)) for start in (first, second))])
