"""The record of runs and the shelf of trained artifacts: MLflow behind a few plain functions.

By default everything is on this machine, a SQLite file and folders under PRISM_HOME (default ~/.prism), safe for
several processes at once. MLFLOW_TRACKING_URI names a server instead. Both are read when a function is called.

>>> run = start_run("send", {"steps": 100})                             # doctest: +SKIP
>>> log_metrics(run, {"loss": 2.5}, step=1)                             # doctest: +SKIP
>>> register("outputs/send", "send", run=run, aliases=["champion"])     # doctest: +SKIP
1
>>> resolve("models:/send@champion")                                    # doctest: +SKIP
PosixPath('/home/me/.prism/artifacts/...')
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster import storage
from cluster.registry_session import database, home, location, session
from library import files
from library.artifact import MANIFEST, Artifact, open_artifact
from library.errors import ArtifactError, InputError, PrismError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

Status = Literal["FINISHED", "FAILED", "KILLED"]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
ALIAS = re.compile(r"(?!latest$|[vV]\d+$)[\w-]+", re.ASCII)
REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+|latest)|@(?P<alias>[\w-]+))?", re.ASCII)
CHAMPION = "champion"  # the alias that endpoints serve
FOREIGN_IN_KEY = re.compile(r"[^\w\-. :/]", re.ASCII)
PARAMETERS_PER_CALL = 100  # MLflow's limits
PARAMETER_LENGTH = 6000
PAST_MOVES = 20  # of an alias that are remembered


@dataclass(frozen=True)
class Run:
    """A started run: its identifier and the registry that holds it, so that any process can log to it."""

    id: str
    registry: str


@dataclass(frozen=True)
class Version:
    """A registered version of a model. `artifact` is the artifact's own version, a hash of its content."""

    name: str
    version: int
    kind: str
    artifact: str
    metrics: dict[str, float]
    aliases: tuple[str, ...]
    created: float
    run: str


def start_run(job: str, config: Mapping[str, Any]) -> Run:
    """Record that `job` starts with `config` (JSON values). Its fields become parameters; the whole is config.json."""
    uri = location()
    parameters = [(_key(name), text[:PARAMETER_LENGTH]) for name, text in _flat(config)]
    with session(uri, create=True) as client:
        from mlflow.entities import Param

        run = _new_run(client, uri, job)
        for start in range(0, len(parameters), PARAMETERS_PER_CALL):
            batch = parameters[start : start + PARAMETERS_PER_CALL]
            client.log_batch(run.id, params=[Param(name, text) for name, text in batch])
        client.log_dict(run.id, dict(config), "config.json")
    return run


def log_metrics(run: Run, metrics: Mapping[str, float], step: int) -> None:
    """Record metrics of a step. Raises PrismError when the registry cannot be reached: the caller decides."""
    now = int(time.time() * 1000)
    with session(run.registry) as client:
        from mlflow.entities import Metric

        client.log_batch(run.id, metrics=[Metric(_key(name), float(v), now, step) for name, v in metrics.items()])


def finish_run(run: Run, status: Status = "FINISHED") -> None:
    """Record how a run ended."""
    with session(run.registry) as client:
        client.set_terminated(run.id, status)


def register(folder: str | Path, name: str, *, run: Run | None = None, aliases: Sequence[str] = ()) -> int:
    """Copy the artifact in `folder` into the registry as a new version of model `name`, and return its number.

    An artifact whose content is registered under that name already keeps its version; `aliases` are set in both
    cases. Raises InputError for a bad name or alias, ArtifactError for a missing or corrupt artifact, PrismError for
    a registry that cannot be reached: the artifact stays where it is, and the same call later finishes the work.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"model name {name!r}: allowed are letters, digits, and after the first character - _ .")
    for alias in aliases:
        _check_alias(alias)
    artifact = open_artifact(folder)
    uri = run.registry if run else location()
    try:
        with session(uri, create=True) as client:
            version = _same_content(client, name, artifact)
            holder = None if version else run or _new_run(client, uri, name)
        if holder is not None:
            with session(uri, exclusive=False) as client:  # it may be large: others can use the registry meanwhile
                client.log_artifacts(holder.id, str(artifact.path), artifact.version)
            with session(uri) as client:
                version = _same_content(client, name, artifact) or _add_version(client, name, artifact, holder)
                if run is None:
                    client.set_terminated(holder.id)
        with session(uri) as client:
            for alias in aliases:
                _move(client, name, alias, int(version))
    except PrismError as error:
        raise PrismError(
            f"{error}; the artifact is safe at {artifact.path}: retry with `prism registry push {artifact.path}`"
        ) from error
    return int(version)


def resolve(reference: str | Path, *, kind: str | None = None) -> Path:
    """The local folder of an artifact, checked.

    `reference` is models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME (its newest version), a local folder, or a
    folder on remote storage. Remote artifacts are copied to PRISM_HOME once. Raises InputError for an unknown model,
    version or alias (naming those that exist), ArtifactError for a corrupt artifact or one of another `kind`.
    """
    if not str(reference).startswith("models:"):
        path = storage.local_path(reference) if storage.is_local(reference) else _fetch(str(reference))
        return open_artifact(path, kind=kind).path
    match = REFERENCE.fullmatch(str(reference))
    if match is None:
        raise InputError(f"{reference} is not understood; allowed are models:/NAME, models:/NAME/3, models:/NAME@ALIAS")
    uri = location()
    with session(uri) as client:
        version = _find(client, **match.groupdict())
        source = client.get_model_version_download_uri(version.name, version.version)
    expected = version.tags.get("artifact", "")
    path = storage.local_path(source) if storage.is_local(source) else home() / "cache" / f"{version.name}-{expected}"
    if not storage.is_local(source) and not (path / MANIFEST).is_file():
        with session(uri), files.atomic_folder(path) as temporary:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            get_artifact_repository(source, tracking_uri=uri).download_artifacts("", dst_path=str(temporary))
    artifact = open_artifact(path, kind=kind)
    if artifact.version != expected:
        raise ArtifactError(f"{path} is not the artifact that was registered as {version.name} {version.version}")
    return artifact.path


def artifact_version(reference: str) -> str:
    """The artifact's version that models:/NAME@ALIAS means now: one cheap question, for those who ask again and again.

    Raises InputError for what is no such reference, PrismError when there is no answer.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None or match["alias"] is None:
        raise InputError(f"{reference} does not name an alias; give models:/NAME@ALIAS")
    with session(location(), exclusive=False) as client:
        return client.get_model_version_by_alias(match["name"], match["alias"]).tags.get("artifact", "")


def follows(reference: str) -> bool:
    """Whether a reference may mean another artifact later: whether it names an alias."""
    match = REFERENCE.fullmatch(reference)
    return match is not None and match["alias"] is not None


def set_alias(name: str, alias: str, version: int) -> None:
    """Let models:/NAME@ALIAS mean `version` of model `name` from now on; `roll_back` returns to what it meant."""
    _check_alias(alias)
    with session(location()) as client:
        _find(client, name, str(version), None)
        _move(client, name, alias, version)


def crown_first(name: str, version: int) -> bool:
    """Let models:/NAME@champion mean `version` unless it means one already; whether it was set."""
    with session(location()) as client:
        if CHAMPION in _model(client, name).aliases:
            return False
        _move(client, name, CHAMPION, version)
    return True


def roll_back(name: str, alias: str) -> int:
    """Let models:/NAME@ALIAS mean again what it meant before its last move, and return that version's number.

    Repeated, it goes further back. Raises InputError when there is nothing to go back to.
    """
    with session(location()) as client:
        model = _model(client, name)
        if alias not in model.aliases:
            raise InputError(
                f"model {name} has no alias {alias!r}; it has {', '.join(sorted(model.aliases)) or 'none'}"
            )
        now = int(model.aliases[alias])
        there = {int(version.version) for version in _versions(client, name)}
        past = [version for version in _past(model, alias) if version in there]
        while past and past[-1] == now:
            past.pop()
        if not past:
            raise InputError(f"models:/{name}@{alias} has meant version {now} alone; promote another one instead")
        back = past.pop()
        client.set_registered_model_alias(name, alias, str(back))
        client.set_registered_model_tag(name, f"past.{alias}", json.dumps(past))
    return back


def list_models() -> list[str]:
    """The names of the registered models, sorted; none when there is no registry yet."""
    if not _present():
        return []
    with session(location()) as client:
        return _model_names(client)


def list_versions(name: str) -> list[Version]:
    """The versions of a model, newest first. Raises InputError for a model that is not registered."""
    with session(location()) as client:
        model = _model(client, name)
        return [_describe(version, model.aliases) for version in _versions(client, name)]


def _present() -> bool:
    file = database(location())
    return file is None or file.is_file()


def _new_run(client: "MlflowClient", uri: str, name: str) -> Run:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        file = database(uri)
        place = (file.parent / "artifacts" / name).as_uri() if file else None
        try:
            identifier = client.create_experiment(name, artifact_location=place)
        except MlflowException:
            experiment = client.get_experiment_by_name(name)  # on a server another process may have been faster
            if experiment is None:
                raise
    if experiment is not None:
        identifier = experiment.experiment_id
    return Run(client.create_run(identifier, run_name=name).info.run_id, uri)


def _add_version(client: "MlflowClient", name: str, artifact: Artifact, run: Run) -> int:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    metrics = ", ".join(f"{key} {value:.6g}" for key, value in artifact.metrics.items())
    version = client.create_model_version(
        name,
        source=f"{client.get_run(run.id).info.artifact_uri}/{artifact.version}",
        run_id=run.id,
        tags={"kind": artifact.kind, "artifact": artifact.version, "metrics": json.dumps(artifact.metrics)},
        description=f"{artifact.kind} artifact {artifact.version} of {artifact.manifest.created}; {metrics}",
        await_creation_for=0,
    )
    return int(version.version)


def _same_content(client: "MlflowClient", name: str, artifact: Artifact) -> int | None:
    found = client.search_model_versions(f"name = '{name}' and tags.artifact = '{artifact.version}'")
    return min((int(version.version) for version in found), default=None)


def _find(client: "MlflowClient", name: str, version: str | None, alias: str | None) -> "ModelVersion":
    model = _model(client, name)
    versions = _versions(client, name)
    numbers = [int(v.version) for v in versions]
    wanted: Any = max(numbers, default=None)
    if alias is not None:
        if alias not in model.aliases:
            raise InputError(
                f"model {name} has no alias {alias!r}; it has {', '.join(sorted(model.aliases)) or 'none'}"
            )
        wanted = int(model.aliases[alias])
    elif version not in (None, "latest"):
        wanted = int(version)
    if wanted not in numbers:
        raise InputError(f"model {name} has no version {version or ''}; it has {_ranges(numbers) or 'none'}")
    return versions[numbers.index(wanted)]


def _move(client: "MlflowClient", name: str, alias: str, version: int) -> None:
    """Move an alias; what it meant is written down first, so that a process killed in between loses nothing."""
    model = client.get_registered_model(name)
    if alias in model.aliases and int(model.aliases[alias]) != version:
        past = [*_past(model, alias), int(model.aliases[alias])][-PAST_MOVES:]
        client.set_registered_model_tag(name, f"past.{alias}", json.dumps(past))
    client.set_registered_model_alias(name, alias, str(version))


def _past(model: Any, alias: str) -> list[int]:
    return json.loads(model.tags.get(f"past.{alias}", "[]"))


def _model(client: "MlflowClient", name: str) -> Any:
    names = _model_names(client)
    if name not in names:
        raise InputError(f"no model {name!r} is registered; registered are {', '.join(names) or 'none'}")
    return client.get_registered_model(name)


def _model_names(client: "MlflowClient") -> list[str]:
    return sorted(model.name for model in _all(client.search_registered_models))


def _versions(client: "MlflowClient", name: str) -> list["ModelVersion"]:
    found = _all(lambda **page: client.search_model_versions(f"name = '{name}'", **page))
    return sorted(found, key=lambda version: -int(version.version))


def _all(search: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _describe(version: "ModelVersion", aliases: Mapping[str, Any]) -> Version:
    return Version(
        name=version.name,
        version=int(version.version),
        kind=version.tags.get("kind", ""),
        artifact=version.tags.get("artifact", ""),
        metrics=json.loads(version.tags.get("metrics", "{}")),
        aliases=tuple(sorted(alias for alias, number in aliases.items() if int(number) == int(version.version))),
        created=version.creation_timestamp / 1000,
        run=version.run_id or "",
    )


def _fetch(uri: str) -> Path:
    """A copy of a remote artifact under PRISM_HOME, made again when the remote manifest differs."""
    manifest = sha256(storage.read_bytes(storage.join(uri, MANIFEST))).hexdigest()[:16]
    path = home() / "cache" / manifest
    return path if (path / MANIFEST).is_file() else storage.download_folder(uri, path)


def _check_alias(alias: str) -> None:
    if not ALIAS.fullmatch(alias):
        raise InputError(f"alias {alias!r}: allowed are letters, digits, - and _, but not `latest` and not v1, v2, ...")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _key(name: str) -> str:
    return FOREIGN_IN_KEY.sub("_", name)


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as `1-3, 7`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
