"""Errors meant for people: the command line prints them as one line and exits with code 2."""


class UserError(Exception):
    """Something that the user can put right: the message says what was wrong, where, and what to do."""


class NonFiniteError(UserError):
    """The loss or the gradients of a training step are infinite or NaN."""
