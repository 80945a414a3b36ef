"""Errors for the user. The command line prints them as one line and exits with code 2."""


class UserError(Exception):
    """An error that the user can fix. The message states what was wrong, where, and what to do."""


class NonFiniteError(UserError):
    """The loss or the gradients of a training step are infinite or NaN."""
