"""The verbs of the command line for the model registry."""

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from tyro.conf import Positional

from jobs.commands import SUCCESS, Output, rows


@dataclass(frozen=True)
class RegistryList(Output):
    """The registered models, their newest versions and aliases."""

    def __call__(self) -> int:
        from cluster import registry

        models = {name: registry.list_versions(name) for name in registry.list_models()}
        table = rows("model", "versions", "newest", "aliases")
        for name, versions in models.items():
            aliases = [f"@{alias} {version.version}" for version in versions for alias in version.aliases]
            newest = str(versions[0].version) if versions else "none"
            table.add_row(name, str(len(versions)), newest, ", ".join(aliases))
        self.console().print(
            table if models else "nothing is registered; `prism run send` trains and registers a model"
        )
        self.finish({name: [asdict(version) for version in versions] for name, versions in models.items()})
        return SUCCESS


@dataclass(frozen=True)
class RegistryShow(Output):
    """The versions of a model with their metrics, newest first."""

    name: Positional[str]
    """Name of the model."""

    def __call__(self) -> int:
        from cluster import registry

        versions = registry.list_versions(self.name)
        title = f"{self.name} ({versions[0].kind if versions else 'no versions'})"
        table = rows("version", "aliases", "artifact", "created", "metrics", title=title)
        for version in versions:
            metrics = ", ".join(f"{name} {value:.5g}" for name, value in version.metrics.items())
            created = f"{datetime.fromtimestamp(version.created):%Y-%m-%d %H:%M}"
            table.add_row(str(version.version), ", ".join(version.aliases), version.artifact, created, metrics)
        self.console().print(table)
        self.finish([asdict(version) for version in versions])
        return SUCCESS


@dataclass(frozen=True)
class RegistryPush(Output):
    """Register the artifact in a folder, when the registry was down as it was made.

    As after a training, the first version of a model becomes its champion.
    """

    folder: Positional[Path]
    """The artifact's folder, the one with artifact.json."""
    name: str | None = None
    """Name of the model; None is the artifact's method."""
    alias: str | None = None
    """Let this alias mean the new version."""

    def __call__(self) -> int:
        from cluster import registry
        from library.artifact import open_artifact

        name = self.name or open_artifact(self.folder).kind
        version = registry.register(self.folder, name, aliases=[self.alias] if self.alias else [])
        crowned = registry.crown_first(name, version)
        self.console().print(f"models:/{name}/{version}{', the champion' if crowned else ''}", highlight=False)
        self.finish({"name": name, "version": version, "alias": self.alias, "champion": crowned})
        return SUCCESS


@dataclass(frozen=True)
class RegistryPromote(Output):
    """Let an alias mean a version: endpoints that run change over to the @champion within seconds."""

    name: Positional[str]
    """Name of the model."""
    version: Positional[int]
    """Number of the version."""
    alias: str = "champion"
    """The alias."""

    def __call__(self) -> int:
        from cluster import registry

        registry.resolve(f"models:/{self.name}/{self.version}")  # a corrupt one is refused here, not by the endpoints
        registry.set_alias(self.name, self.alias, self.version)
        self.console().print(f"models:/{self.name}@{self.alias} is version {self.version}", highlight=False)
        self.finish({"name": self.name, "version": self.version, "alias": self.alias})
        return SUCCESS


@dataclass(frozen=True)
class RegistryRollback(Output):
    """Let an alias mean again what it meant before it was moved; repeated, go further back."""

    name: Positional[str]
    """Name of the model."""
    alias: str = "champion"
    """The alias."""

    def __call__(self) -> int:
        from cluster import registry

        version = registry.roll_back(self.name, self.alias)
        self.console().print(f"models:/{self.name}@{self.alias} is version {version} again", highlight=False)
        self.finish({"name": self.name, "version": version, "alias": self.alias})
        return SUCCESS
