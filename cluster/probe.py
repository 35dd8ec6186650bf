"""Is the service there? Short, bounded checks before a client that would retry for minutes."""

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from library.errors import InputError, PrismError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 5.0


def ray_cluster(address: str) -> None:
    """Raise PrismError within 10 seconds unless a Ray head (its global control store) answers at "host:port"."""
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    _ask(
        address,
        lambda channel, **options: services.NodeInfoGcsServiceStub(channel).CheckAlive(
            messages.CheckAliveRequest(), **options
        ),
        what="Ray cluster",
    )


def ray_client(address: str) -> None:
    """Raise PrismError within 10 seconds unless a Ray Client server answers at "host:port"."""
    from ray.core.generated import ray_client_pb2 as messages
    from ray.core.generated import ray_client_pb2_grpc as services

    request = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    _ask(
        address,
        lambda channel, **options: services.RayletDriverStub(channel).ClusterInfo(request, **options),
        what="Ray Client server",
    )


def web_service(url: str, *, what: str) -> None:
    """Raise PrismError within 10 seconds unless something that speaks HTTP answers at `url`; InputError for no URL."""
    where = shown(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host = None
    if not host:
        raise InputError(f"{where} is no address of a {what}: allowed is http://HOST:PORT, https as well") from None
    _reach(host, port, what=what, where=where)
    asked = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        urllib.request.urlopen(f"{asked.rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered: whether it lets this user in is for the request itself to find out
    except (OSError, ValueError, HTTPException) as error:
        raise PrismError(f"no {what} answers at {where}: the port is open but does not speak HTTP") from error


def shown(text: str) -> str:
    """A URL, or a text with URLs, without the users' names and passwords: what may be printed and kept.

    >>> shown("http://admin:secret@registry:5000 failed")
    'http://registry:5000 failed'
    """
    return re.sub(r"(?<=://)\S*@", "", text)


def on_this_machine(url: str) -> bool:
    """Whether a URL names this machine's loopback; what is no URL does not."""
    try:
        return urlsplit(url).hostname in LOOPBACK
    except ValueError:
        return False


def _reach(host: str, port: int, *, what: str, where: str) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = "it does not respond" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise PrismError(f"no {what} at {where}: {reason}") from error


def _ask(address: str, call: Callable[..., Any], *, what: str) -> None:
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    parts = urlsplit(f"//{address}")
    _reach(parts.hostname or "", parts.port or 0, what=what, where=address)
    channel = init_grpc_channel(address)
    try:
        call(channel, timeout=ANSWER_SECONDS, wait_for_ready=True)
    except grpc.RpcError as error:
        reasons = {
            grpc.StatusCode.UNIMPLEMENTED: "another service uses that port",
            grpc.StatusCode.UNAUTHENTICATED: "it refuses this user's token",
        }
        reason = reasons.get(error.code(), "the port is open but no Ray answers there")
        raise PrismError(f"no {what} at {address}: {reason}") from error
    finally:
        channel.close()
