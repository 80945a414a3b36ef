"""Errors for the user. The command line prints them as one line and exits with code 2."""

import sys


class UserError(Exception):
    """An error that the user can fix. The message states what was wrong, where, and what to do."""


class NonFiniteError(UserError):
    """The loss or the gradients of a training step are infinite or NaN."""


def one_line(error: BaseException) -> str:
    """Return the first two lines of an error's message as one line."""
    return " ".join(" ".join(str(error).splitlines()[:2]).split())


def print_error(message: object, rank: int | str = 0) -> None:
    """Print an error of a rank on stderr; ranks other than 0 are named.

    The line is written in one call, so that lines of several ranks do not mix: torchrun starts Python with `-u`, under
    which `print` writes the newline separately.
    """
    sys.stderr.write(f"error: {message}\n" if str(rank) == "0" else f"error (rank {rank}): {message}\n")
    sys.stderr.flush()
