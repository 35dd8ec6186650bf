"""The one family of exceptions. Each message says what was wrong, where, and what is allowed, in one line."""


class PrismError(Exception):
    """Anything that Prism refuses or cannot finish. The command line prints it as one line, without a traceback."""


class InputError(PrismError, ValueError):
    """The caller's input is wrong: exit status 2 on the command line, 422 from an endpoint."""


class ArtifactError(PrismError):
    """An artifact or checkpoint is missing, corrupt, foreign, or of another method."""


class NonFiniteError(PrismError, ArithmeticError):
    """A loss or gradient was not finite; raised on every rank alike, before the optimiser step."""
