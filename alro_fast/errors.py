"""The one exception for mistakes a user can mend; command lines print it as a single line and exit with 2."""


class AlroFastError(ValueError):
    """What was given, what was expected, what to do - in one sentence or two."""
