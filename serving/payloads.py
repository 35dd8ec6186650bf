"""Request bodies: JSON, or for large arrays a NumPy file or an Arrow stream with the other fields in the query.

application/json                        the request as its model says
application/x-npy                       one array (.npy), for endpoints that take one; never with Python objects in it
application/vnd.apache.arrow.stream     one table (Arrow IPC stream, not compressed), for endpoints that take one

    curl --data-binary @weight.npy -H 'Content-Type: application/x-npy' 'http://.../spectrum/predict?method=plain'

"""

import json
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from library.errors import InputError
from serving.arrays import npy, table
from serving.endpoint import NPY, Endpoint

JSON = "application/json"
MOST_ERRORS = 1000  # that are told one by one: each costs a kilobyte, and a body of 8 MiB can have a million


class Unsupported(Exception):
    """A content type that the endpoint does not read: 415."""


def read(endpoint: type[Endpoint], content_type: str | None, query: Mapping[str, str], content: bytes) -> BaseModel:
    """The request that a body holds. Raises RequestValidationError, InputError or Unsupported."""
    kind = (content_type or JSON).partition(";")[0].strip().lower()
    if kind != JSON and kind not in endpoint.media:
        raise Unsupported(f"{endpoint.name} takes no {kind[:80]!r} body; it takes {', '.join((JSON, *endpoint.media))}")
    try:
        if kind == JSON:
            return endpoint.Request.model_validate_json(content)
        settings = {name: _value(text) for name, text in query.items()}
        return endpoint.read(npy(content) if kind == NPY else table(content, nested=endpoint.nested), settings)
    except ValidationError as error:
        if error.error_count() > MOST_ERRORS:
            raise InputError(f"body: {error.error_count()} fields are wrong, or none of this endpoint's") from error
        found = error.errors(include_url=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from error


def _value(text: str) -> Any:
    """A setting from the query: JSON when it is, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
