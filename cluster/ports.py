"""Ports of this machine that stay free until they are used.

A port that the system picks (`bind` to 0) is of the range that it also gives to every outgoing connection and to every
server that asks for any port: while Ray starts its processes, such a port is soon somebody else's.
"""

import random
import socket
from functools import cache

from library.errors import PrismError

OFFERED = range(24_001, 30_000)  # below Linux's own picks (32768 on), above those of Ray's workers and clients
RANGES = range(30_000, 32_600, 200)  # the first port of each
_claims: list[socket.socket] = []  # open until the process ends


def free_ports(count: int) -> list[int]:
    """Different ports that nobody on 127.0.0.1 has. Raises PrismError when there are not that many."""
    free: list[int] = []
    for port in random.SystemRandom().sample(OFFERED, len(OFFERED)):
        if len(free) == count:
            break
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        free.append(port)
    if len(free) < count:
        raise PrismError(f"{len(free)} of the ports {OFFERED[0]} to {OFFERED[-1]} are free; {count} are needed")
    return free


def free_port() -> int:
    """A port that nobody on 127.0.0.1 has."""
    return free_ports(1)[0]


@cache
def own_range() -> range | None:
    """199 ports in a row that this function gives to no other process while this one lives; None if none are left.

    Where servers come and go on the ports of one range, a client of the one that went must not find another's server.
    """
    for first in random.SystemRandom().sample(RANGES, len(RANGES)):
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", first))
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return range(first + 1, first + RANGES.step)
    return None
