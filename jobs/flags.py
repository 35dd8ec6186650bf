"""Typed command-line flags from configuration classes: a flag and its help for every field, and errors in one line."""

import contextlib
import inspect
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from pydantic import BaseModel, ValidationError

from cluster import storage
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

    The fields of the models that a job is made of (`recipe`, `scaling`) are flags without a prefix, unless a name
    would mean two things; a job inside a job (`--base.steps`) and what is nested deeper (`--answers.samples`) keep
    theirs. `default` is the job that the flags change.
    """
    flags = flat(job)
    both = make_dataclass(
        job.__name__,
        [
            ("job", Annotated[flags, Flat], *([field(default=_converted(default, flags))] if default else [])),
            ("options", Annotated[options, Flat], field(default_factory=options)),
        ],
    )
    made = parse(both, args, prog=prog, description=inspect.cleandoc(job.__doc__ or ""))
    return job.model_validate(made.job.model_dump()), made.options


def flat(job: "type[Job]") -> "type[Job]":
    """The same job for tyro: models among its fields lose their prefix, jobs keep it, and what is given is no flag."""
    bare = unprefixed(job)
    inner: dict[str, Any] = {}
    defaults = {}
    for name, entry in job.model_fields.items():
        if _is_job(entry.annotation):
            inner[name] = flat(entry.annotation)
        elif name in bare:
            inner[name] = Annotated[entry.annotation, Flat]
        elif get_origin(entry.annotation) is Literal and len(get_args(entry.annotation)) == 1:
            inner[name] = Annotated[entry.annotation, tyro.conf.Suppress]
        if name in inner and not entry.is_required():
            defaults[name] = _converted(entry.default, inner[name]) if _is_job(entry.annotation) else entry.default
    return type(job.__name__, (job,), {"__annotations__": inner, "__module__": job.__module__, **defaults})


def load_record(place: str) -> dict[str, Any]:
    """The record of a job, from a file or URI: a run's job.json, a registered run's config.json, or a report.json.

    Raises InputError for a place that is not there or holds no JSON object.
    """
    try:
        content = storage.local_path(place).read_bytes() if storage.is_local(place) else storage.read_bytes(place)
        record = json.loads(content)
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{place} is not JSON: {error}") from error
    record = record.get("config", record) if isinstance(record, dict) else record
    if not isinstance(record, dict):
        raise InputError(f"{place} holds no JSON object; a job's record is one, such as job.json in a run's folder")
    return record


def from_record(job: "type[Job]", record: Mapping[str, Any], *, source: str) -> "Job":
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


def _converted(job: "Job", kind: "type[Job]") -> "Job":
    """The job as an instance of its flat class, whose values need no second validation."""
    inner = {name: entry.annotation for name, entry in kind.model_fields.items() if _is_job(entry.annotation)}
    values = {name: getattr(job, name) for name in kind.model_fields}
    return kind.model_construct(**values | {name: _converted(values[name], inner[name]) for name in inner})


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_job(annotation: Any) -> bool:
    return _is_model(annotation) and hasattr(annotation, "job")


def unprefixed(job: type[BaseModel]) -> set[str]:
    """The fields of a job whose models lose their prefix."""
    taken = {name for name, entry in job.model_fields.items() if not _is_model(entry.annotation)}
    bare = set()
    for name, entry in job.model_fields.items():
        if _is_model(entry.annotation) and not _is_job(entry.annotation):
            names = entry.annotation.model_fields.keys()
            if not names & taken:
                bare.add(name)
                taken |= names
    return bare


def _prefix(options: type, title: str) -> str:
    """The prefix of the flags of the model class named `title`, somewhere inside the job of `parse_job`'s options."""
    job = getattr(options, "__annotations__", {}).get("job")
    return dict(reversed(list(_prefixes(job.__origin__)))).get(title, "") if job else ""


def _prefixes(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Class name and prefix of every model inside a model, as `flat` makes them."""
    bare = unprefixed(model) if _is_job(model) else set()
    for name, entry in model.model_fields.items():
        if _is_model(entry.annotation):
            inner = prefix if name in bare else f"{prefix}{name}."
            yield entry.annotation.__name__, inner
            yield from _prefixes(entry.annotation, inner)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _in_one_line(box: str) -> str:
    """What tyro prints in a box, as one line: its first paragraph, and the flag that it explains or suggests.

    A terminal that knows no box characters gets the title as a paragraph of its own.
    """
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    paragraphs = [part.splitlines() for part in re.sub("─{8,}|-{8,}", "\f", "\n".join(lines)).split("\f")]
    if len(paragraphs) > 1 and not box.startswith("╭"):
        del paragraphs[0]
    problem = " ".join(filter(None, paragraphs[0])).partition(" Got errors:")[0].rstrip(".")
    problem = re.sub(r"^Error parsing (\S+):", r"\1:", problem) or "the command line is not understood"
    flags = [line for part in paragraphs[1:] for line in part if line.startswith("--")]
    hint = "did you mean" if problem.startswith("Unrecognized") else "expected"
    first = problem if problem.split(":")[0].isupper() else problem[0].lower() + problem[1:]
    return first + (f"; {hint} {flags[0]}" if flags else "")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
