"""What a client gets instead of an answer: one line, the fields at fault, the request's id, nothing of the inside."""

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from library.errors import InputError
from serving.endpoint import TooLarge
from serving.payloads import Unsupported

LOG = logging.getLogger("ray.serve")
FIELD = re.compile(r"(?P<field>[a-z_]\w*(?:\.[a-z_]\w*|\[\d+\])*): (?P<problem>.*)", re.ASCII | re.DOTALL)
NESTED = re.compile(
    r"(?!(?:int|str|float|bool|list|dict|none)$)[a-z_]\w{0,63}", re.ASCII
)  # a field, not an alternative
MOST_FIELDS = 8  # in one response
LONGEST_NAME = 64  # of a field that a client made up
MEANINGS = {
    401: "The bearer token is missing or wrong.",
    415: "The endpoint does not read bodies of this content type.",
    413: "The body is too large, or asks for too much.",
    422: "The body is not valid; `fields` says where and what is allowed.",
    429: "Too many requests are waiting; retry after a moment.",
    500: "An unexpected failure; the log has it under the request's id.",
    503: "Not loaded, or no answer within the time limit.",
}


class FieldProblem(BaseModel):
    """A field of the body and what is wrong with it."""

    field: str
    problem: str


class Problem(BaseModel):
    """The body of every response that is no answer."""

    error: str = Field(description="One line: what was wrong, and what is allowed.")
    fields: list[FieldProblem] = Field(description="The fields at fault; empty unless the status is 422.")
    request_id: str = Field(description="Also in the X-Request-Id header and in the server's log.")


class Overloaded(Exception):
    """Too many requests are waiting."""


class Late(Exception):
    """No answer within the time limit."""


class Gone(Exception):
    """The client went away before its answer."""


def problem_response(
    request_id: str, status: int, error: str, fields: Sequence[FieldProblem] = (), **headers: str
) -> Response:
    """A Problem as JSON in ASCII, so that no text of a client can fail to be sent."""
    content = Problem(error=error, fields=list(fields), request_id=request_id).model_dump()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(json.dumps(content), status, named, "application/json")


def problem_of(request_id: str, error: Exception) -> Response:
    """The response to an exception; to one that is not of EXPECTED it shows nothing but the request's id."""
    match error:
        case TooLarge():
            return problem_response(request_id, 413, str(error))
        case InputError():
            line = " ".join(str(error).split())
            named = FIELD.fullmatch(line)
            return problem_response(request_id, 422, line, [FieldProblem(**named.groupdict())] if named else [])
        case RequestValidationError():
            fields = _fields(error.errors())
            line = "; ".join(f"{entry.field}: {entry.problem}" for entry in fields)
            return problem_response(request_id, 422, line, fields)
        case Overloaded():
            return problem_response(request_id, 429, str(error), retry_after="1")
        case Late():
            return problem_response(request_id, 503, str(error), retry_after="1")
        case Gone() | ClientDisconnect():
            return problem_response(request_id, 499, "the client has gone away")
        case Unsupported():
            return problem_response(request_id, 415, str(error))
        case HTTPException():
            headers = {name.replace("-", "_"): value for name, value in (error.headers or {}).items()}
            return problem_response(request_id, error.status_code, str(error.detail), **headers)
        case _:
            text = "an unexpected failure; the server's log has the request's id"
            return problem_response(request_id, 500, text)


EXPECTED = (InputError, RequestValidationError, Unsupported, Overloaded, Late, Gone, ClientDisconnect, HTTPException)


def handle_problems(app: FastAPI) -> None:
    """Let the application answer all exceptions that it expects with a Problem."""

    def handler(request: Request, error: Exception) -> Response:
        return problem_of(request_id(request), error)

    for kind in EXPECTED:
        app.add_exception_handler(kind, handler)


def request_id(request: Request) -> str:
    """The id that the client gave, or that was made for it on the way in."""
    return request.headers["x-request-id"]


def _fields(errors: Sequence[dict[str, Any]]) -> list[FieldProblem]:
    """One entry for each field, with what each alternative of it allows; at most `MOST_FIELDS`."""
    problems: dict[str, list[str]] = {}
    for error in errors:
        field, problem = _field_name(error["loc"]), _problem(error)
        if named := FIELD.fullmatch(problem):  # a check over several fields that blames one
            inner, problem = named.groups()
            field = inner if field == "body" else f"{field}.{inner}"
        problems.setdefault(field, []).append(problem)
    return [
        FieldProblem(field=field, problem=", or ".join(dict.fromkeys(found)))
        for field, found in list(problems.items())[:MOST_FIELDS]
    ]


def _field_name(location: Sequence[str | int]) -> str:
    """`prompts[2].text` for ("body", "prompts", 2, "text"); names of a union's alternatives are left out."""
    _, *path = location
    if not path or not isinstance(path[0], str):
        return "body"
    name = path[0] if len(path[0]) <= LONGEST_NAME else path[0][:LONGEST_NAME] + "..."
    for step in path[1:]:
        if isinstance(step, int):
            name += f"[{step}]"
        elif NESTED.fullmatch(step):
            name += f".{step}"
    return name


def _problem(error: dict[str, Any]) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "json_invalid":
        return f"not JSON: {error['ctx']['error']}"
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    return error["msg"]
