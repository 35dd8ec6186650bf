"""What a deployment of an endpoint can be told: the typed arguments of an application in `serving/prism.yaml`."""

import os
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from library.errors import InputError, PrismError


class EndpointArgs(BaseModel, frozen=True, extra="forbid"):
    """Which endpoint an application serves, over which artifact, within which limits."""

    endpoint: str
    """Name of the endpoint, such as hallucination."""
    artifact: str | None = None
    """A registry reference, a folder or a storage URI; None is models:/<the endpoint's model>@champion."""
    request_cost: PositiveInt | None = None
    """Most that one request may cost, in the endpoint's unit; None is the endpoint's own limit."""
    batch_cost: PositiveInt | None = None
    """Most that requests which share a batch may cost together; None is the endpoint's own limit."""
    batch_wait_s: float = Field(0.005, ge=0, le=1)
    """How long a batch waits for company when the one before had some; a lone client never waits."""
    update_period_s: float = Field(5.0, ge=0)
    """How often a replica looks whether its alias, such as @champion, means another artifact; 0 for never."""
    timeout_s: PositiveFloat = 60.0
    """How long a request may wait for its answer; then it gets 503."""
    max_pending: PositiveInt = 64
    """Requests that one replica holds; a further one gets 429."""
    max_body_bytes: PositiveInt = 8 << 20
    """Largest request body; a larger one gets 413."""
    token_file: str | None = None
    """File that holds the bearer token; None is the token in PRISM_TOKEN, and without one no token is needed."""


def token_digest(token_file: str | None) -> str | None:
    """SHA-256 of the bearer token that clients must present, in hexadecimal; None when none is configured.

    Only the digest travels to the replicas. Raises PrismError for a file that cannot be read, InputError for what
    no header could hold.
    """
    if token_file is None:
        token = os.environ.get("PRISM_TOKEN")
        if token is None:
            return None
        source = "PRISM_TOKEN"
    else:
        source = f"token file {token_file}"
        try:
            token = Path(token_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PrismError(f"{source} cannot be read: {error}") from error
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(f"{source} holds no token: printable ASCII characters without spaces are needed")
    return sha256(token.encode()).hexdigest()
