"""The error of the command line."""


class Unusable(ValueError):
    """The request cannot be met; the message says what was given, what is allowed, and the cure. Exit code 2."""
