"""The exceptions that command lines print as a single line: mistakes a user can mend (exit status 2), and stops."""


class AlroFastError(ValueError):
    """What was given, what was expected, what to do - in one sentence or two."""


class Stopped(KeyboardInterrupt):
    """A run that a signal ended in good order: where it stands, how to go on. `status`: 128 + the signal's number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
