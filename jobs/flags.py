"""Typed command-line flags from configuration classes: a flag and its help for every field, and errors in one line."""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from library.errors import InputError

if TYPE_CHECKING:
    from jobs.job import Job

Options = TypeVar("Options")
Flat = tyro.conf.arg(name="")
SHOWN = 3  # errors of one command line or file that are named


def parse(options: type[Options], args: Sequence[str], *, prog: str, description: str | None = None) -> Options:
    """The instance of a dataclass or pydantic model that `args` describe; `--help` prints the flags and exits.

    Raises InputError, in one line that names the flags, for anything that tyro or pydantic refuses.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                options,
                args=args,
                prog=prog,
                description=description,
                config=(tyro.conf.PositionalMetavarFromFieldName,),
            )
    except ValidationError as error:
        refused: BaseException | None = error
    except SystemExit as stop:
        if not stop.code:
            raise
        refused = stop
    found = next((error for error in _chain(refused) if isinstance(error, ValidationError)), None)
    message = explain(found, options=options) if found else _in_one_line(shown.getvalue())
    raise InputError(f"{message}; see {prog} --help") from None


def parse_job(
    job: "type[Job]", options: type[Options], args: Sequence[str], *, prog: str, default: "Job | None" = None
) -> "tuple[Job, Options]":
    """The job, and the further `options` of the verb (a dataclass with defaults), that `args` describe.

    The fields of the models that a job is made of (`recipe`, `scaling`) are flags without a prefix; what is nested
    deeper keeps its own (`--answers.samples`). `default` is the job that the flags change.
    """
    both = make_dataclass(
        job.__name__,
        [
            ("job", Annotated[flat(job), Flat], *([field(default=default)] if default else [])),
            ("options", Annotated[options, Flat], field(default_factory=options)),
        ],
    )
    made = parse(both, args, prog=prog, description=job.__doc__)
    return job.model_validate({name: getattr(made.job, name) for name in job.model_fields}), made.options


def flat(job: "type[Job]") -> "type[Job]":
    """The same job for tyro: the models among its fields lose their prefix."""
    inner = {name: Annotated[entry.annotation, Flat] for name, entry in job.model_fields.items() if _is_model(entry)}
    defaults = {name: job.model_fields[name].default for name in inner if not job.model_fields[name].is_required()}
    return type(job.__name__, (job,), {"__annotations__": inner, "__module__": job.__module__, **defaults})


def load_record(file: Path) -> dict[str, Any]:
    """The record of a job: a run's job.json, a registered run's config.json, or the config of a report.json.

    Raises InputError for a file that is not there or holds no JSON object.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{file} holds no JSON object; a job's record is one, such as job.json in a run's folder")
    return record.get("config", record)


def from_record(job: "type[Job]", record: Mapping[str, Any], *, source: Path) -> "Job":
    """The job of a record. Raises InputError that names the fields at fault, and when it is another job's record."""
    named = record.get("job", job.job)
    if named != job.job:
        raise InputError(f"{source} is a record of job {named!r}, not of {job.job!r}")
    try:
        return job.model_validate_json(json.dumps({name: value for name, value in record.items() if name != "job"}))
    except ValidationError as error:
        raise InputError(f"{source}: {explain(error)}") from None


def explain(error: ValidationError, *, options: type | None = None) -> str:
    """Which fields are wrong and what is allowed, in one line; by their flags when the `options` are given."""
    parts = []
    for entry in error.errors()[:SHOWN]:
        message = re.sub(r"^(Value error, |Input )", "", entry["msg"])
        place = [part for part in entry["loc"] if not (isinstance(part, str) and re.search(r"[\[\]()-]", part))]
        if options is None:
            name = ".".join(map(str, place))
        else:
            name = f"--{_prefix(options, error.title)}{place[0]}".replace("_", "-") if place else ""
        known = entry["type"] in ("value_error", "missing") or not name
        given = "" if known else f", not {_shortened(entry['input'])}"
        parts.append(f"{name}: {message}{given}" if name else message)
    more = error.error_count() - SHOWN
    return "; ".join(parts) + (f"; and {more} more" if more > 0 else "")


def _is_model(entry: Any) -> bool:
    return isinstance(entry.annotation, type) and issubclass(entry.annotation, BaseModel)


def _prefix(options: type, title: str) -> str:
    """The prefix of the flags of the model class named `title`, somewhere inside the job of `parse_job`'s options."""
    job = getattr(options, "__annotations__", {}).get("job")
    found = _models(job.__origin__) if job else ()
    return next((f"{'.'.join(path[1:])}." for path, name in found if name == title and path[1:]), "")


def _models(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Place and class name of every model inside a model."""
    for name, entry in model.model_fields.items():
        if _is_model(entry):
            yield (*path, name), entry.annotation.__name__
            yield from _models(entry.annotation, (*path, name))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _in_one_line(box: str) -> str:
    """What tyro prints in a box, as one line: its first paragraph, and the flag that it explains or suggests."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    paragraphs = [part.splitlines() for part in re.sub("─{8,}", "\f", "\n".join(lines)).split("\f")]
    problem = " ".join(filter(None, paragraphs[0])).partition(" Got errors:")[0].rstrip(".")
    problem = re.sub(r"^Error parsing (\S+):", r"\1:", problem) or "the command line is not understood"
    flags = [line for part in paragraphs[1:] for line in part if line.startswith("--")]
    hint = "did you mean" if problem.startswith("Unrecognized") else "expected"
    first = problem if problem.split(":")[0].isupper() else problem[0].lower() + problem[1:]
    return first + (f"; {hint} {flags[0]}" if flags else "")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
