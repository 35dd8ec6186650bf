"""Calling an endpoint that runs: what `prism ask` does."""

import os
import time
from collections.abc import Mapping
from typing import Any

from cluster.probe import on_this_machine
from library.errors import InputError, PrismError
from serving.app import named

URL = "http://127.0.0.1:8000"
RETRY_S = 20.0


def example(endpoint: str) -> dict[str, Any]:
    """A request that the endpoint answers. Raises InputError for an unknown endpoint."""
    return dict(next(iter(named(endpoint).examples.values())))


def ask(
    endpoint: str,
    payload: Mapping[str, Any] | None = None,
    url: str = URL,
    *,
    token: str | None = None,
    timeout: float = 150.0,
) -> dict[str, Any]:
    """The answer of a running endpoint to `payload`, None for its example. `token` defaults to PRISM_TOKEN.

    A request that is lost on the way, refused because too many wait, or met by a server that is not ready is sent
    again for up to RETRY_S seconds: predictions change nothing.

    Raises InputError for a payload that the endpoint refuses, naming the fields, and PrismError when nothing answers
    at the address, the endpoint is not served there, the token is not the right one, or the answer takes too long.

    Example:
        >>> ask("hallucination", {"prompt": "The capital of France is"})["results"][0]["risk"]  # doctest: +SKIP
        0.31
    """
    import httpx

    body = example(endpoint) if payload is None else dict(payload)
    token = token or os.environ.get("PRISM_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    base = url.rstrip("/")
    try:
        with httpx.Client(timeout=timeout, headers=headers, trust_env=not on_this_machine(base)) as client:
            response = _posted(client, f"{base}/{endpoint}/predict", body)
            served = _served(client, base) if response.status_code == 404 else []
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InputError(f"{url} is not an address; use one like {URL}") from error
    except httpx.TimeoutException as error:
        raise PrismError(f"{endpoint} at {url} gave no answer within {timeout:g} seconds") from error
    except httpx.TransportError as error:
        raise PrismError(
            f"nothing answers at {url}; start the endpoint with `prism serve {endpoint}`, or give its address"
        ) from error
    except (TypeError, ValueError) as error:
        raise InputError(f"the payload is not JSON: {error}") from error
    return _content(response, endpoint, url, served)


def _posted(client: Any, url: str, body: Mapping[str, Any]) -> Any:
    """The response to the body; one that says when to retry is the last that came in RETRY_S seconds."""
    import httpx

    deadline = time.monotonic() + RETRY_S
    sent = False
    while True:
        try:
            response = client.post(url, json=body)
            if response.status_code not in (429, 503) or "retry-after" not in response.headers:
                return response
            if time.monotonic() > deadline:
                return response
            sent = True
        except httpx.TimeoutException:
            raise
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            if time.monotonic() > deadline:
                raise
            sent = True
        except httpx.ConnectError:
            if not sent or time.monotonic() > deadline:  # nobody was ever there
                raise
        time.sleep(0.5)


def _content(response: Any, endpoint: str, url: str, served: list[str]) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.status_code == 200 and isinstance(content, dict):
        return content
    known = isinstance(content, dict) and "error" in content
    reason = content["error"] if known else response.text.strip().partition("\n")[0][:200]
    if response.status_code in (413, 422) and known:
        raise InputError(f"{endpoint}: {reason}")
    if response.status_code == 404:
        raise PrismError(f"{endpoint} is not served at {url}; served there: {', '.join(served) or 'nothing of ours'}")
    if response.status_code == 401:
        raise PrismError(f"{endpoint} at {url} needs a token: set PRISM_TOKEN to the one that it was started with")
    if response.status_code == 200 or not (known or "x-request-id" in response.headers):
        raise PrismError(f"what answers at {url} is not a Prism endpoint")
    identifier = response.headers.get("x-request-id", "none")
    raise PrismError(f"{endpoint} at {url} answered {response.status_code}: {reason} (request {identifier})")


def _served(client: Any, base: str) -> list[str]:
    """The applications of the Serve at `base`; none when it is another server."""
    response = client.get(f"{base}/-/routes")
    try:
        routes = response.json()
    except ValueError:
        return []
    return sorted(routes.values()) if response.status_code == 200 and isinstance(routes, dict) else []
