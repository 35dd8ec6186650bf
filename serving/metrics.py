"""What an endpoint counts and times, for Prometheus: Ray exports it on every node beside its own metrics.

prism_requests              by endpoint, status and model
prism_queue_seconds         from arrival to the beginning of the call of the model, by endpoint
prism_model_seconds         of a call of the model, by endpoint
prism_batch_requests        requests that shared a call, by endpoint
prism_batch_cost            what they cost in the endpoint's unit, by endpoint
prism_score                 what `Endpoint.scores` says of each answer, by endpoint and model: its drift is the data's
prism_updates               new artifacts by outcome, taken or refused, by endpoint
"""

from collections.abc import Iterable

from ray.util.metrics import Counter, Histogram

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300]
REQUESTS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
SCORES = 64  # of one answer: noting hundreds takes as long as a small model
COSTS = [float(4**power) for power in range(14)]


class Meter:
    """The metrics of one endpoint; any thread may call its methods."""

    def __init__(self, endpoint: str, score_bounds: Iterable[float]):
        own = {"endpoint": endpoint}

        def histogram(name: str, text: str, bounds: Iterable[float], *tags: str) -> Histogram:
            made = Histogram(name, text, boundaries=list(bounds), tag_keys=("endpoint", *tags))
            made.set_default_tags(own)
            return made

        def counter(name: str, text: str, *tags: str) -> Counter:
            made = Counter(name, text, tag_keys=("endpoint", *tags))
            made.set_default_tags(own)
            return made

        self._requests = counter("prism_requests", "Requests by status.", "status", "model")
        self._updates = counter("prism_updates", "New artifacts, taken or refused.", "outcome")
        self._queue = histogram("prism_queue_seconds", "Seconds before the call of the model.", SECONDS)
        self._model = histogram("prism_model_seconds", "Seconds of a call of the model.", SECONDS)
        self._batch = histogram("prism_batch_requests", "Requests that shared a call.", REQUESTS)
        self._cost = histogram("prism_batch_cost", "What they cost.", COSTS)
        self._score = histogram("prism_score", "Scores of the answers.", score_bounds, "model")

    def request(self, status: int, model: str) -> None:
        """A request has been answered."""
        self._requests.inc(1, {"status": str(status), "model": model})

    def call(self, waits: Iterable[float], seconds: float, requests: int, cost: int) -> None:
        """The model has been called for requests that had waited so long."""
        for wait in waits:
            self._queue.observe(wait)
        self._model.observe(seconds)
        self._batch.observe(requests)
        self._cost.observe(cost)

    def scores(self, values: Iterable[float], model: str) -> None:
        """An answer has these scores; of more than SCORES about so many, evenly spaced, are noted."""
        values = list(values)
        for value in values[:: max(1, len(values) // SCORES)]:
            self._score.observe(value, {"model": model})

    def update(self, outcome: str) -> None:
        """A new artifact was taken or refused."""
        self._updates.inc(1, {"outcome": outcome})
