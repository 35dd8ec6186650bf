"""How the console reaches the endpoints: over HTTP like every other client, with the token of who logged in."""

import hmac
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cluster.probe import on_this_machine
from serving.client import ask


@dataclass
class Endpoints:
    """The endpoints of one Serve. `token` is None where none is needed, and until somebody has logged in."""

    url: str
    served: Mapping[str, str]
    token_digest: str | None = None
    token: str | None = None

    def ask(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of an endpoint. Raises PrismError whose one line says why there is none."""
        return ask(name, body, self.url, token=self.token)

    def serves(self, name: str) -> bool:
        """Whether the endpoint was deployed together with the console."""
        return name in self.served

    def log_in(self, user: str, password: str) -> bool:
        """Whether the password is the endpoints' token, which then goes with every request; any user name will do."""
        presented = sha256(password.strip().encode()).hexdigest()
        if self.token_digest is None or not hmac.compare_digest(presented, self.token_digest):
            return False
        self.token = password.strip()
        return True

    def about(self, names: Iterable[str]) -> dict[str, dict[str, Any] | str]:
        """What each endpoint says of itself, or the line why it does not."""
        import httpx

        found: dict[str, dict[str, Any] | str] = {}
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        trust = not on_this_machine(self.url)
        deadline = time.monotonic() + 10
        with httpx.Client(headers=headers, trust_env=trust) as client:
            for name in names:
                try:
                    left = max(0.5, deadline - time.monotonic())
                    response = client.get(f"{self.url}/{name}/info", timeout=left)
                    found[name] = (
                        response.json() if response.status_code == 200 else f"it answers {response.status_code}"
                    )
                except (httpx.TransportError, ValueError) as error:
                    found[name] = str(error) or type(error).__name__
        return found
