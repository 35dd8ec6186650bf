"""Job: a complete, frozen description of one piece of work on the cluster, and how to run it."""

from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel

from jobs.report import Report


class Job(BaseModel, frozen=True, extra="forbid"):
    """Base of every job. Its JSON is its record: the same file repeats the run (`prism run NAME --config FILE`)."""

    job: ClassVar[str]

    @abstractmethod
    def run(self) -> Report:
        """Do the work on the Ray cluster that this process is connected to (connecting locally when it is not)."""

    def leaves_artifact(self) -> bool:
        """Whether a run that nobody stops ends with an artifact."""
        return False

    def record(self) -> dict[str, Any]:
        """The job as JSON values, with its name."""
        return {"job": self.job, **self.model_dump(mode="json")}
