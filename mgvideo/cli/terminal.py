"""What every program does around its work: text that any terminal can show, closed pipes and Ctrl-C."""

from __future__ import annotations

import codecs
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper

ENCODING_ERRORS = "mgvideo.replace_unencodable"
ASCII_SUBSTITUTES = str.maketrans({  # for the characters that our own lines hold
    **{"×": "x", "·": "-", "–": "-", "—": "-", "−": "-", "±": "+-", "…": "...", "→": "->", "²": "^2", "⁻": "-"},
    **{"τ": "tau", "α": "alpha", "γ": "gamma", "Σ": "sum", "√": "sqrt", "½": "1/2", "¼": "1/4", "≥": ">=", "≤": "<="},
    **{"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"},
    **{chr(code): "-" for code in range(0x2500, 0x25A0)},  # lines of tables, and of rich's progress bars
    **{chr(code): "." for code in range(0x2800, 0x2900)},  # rich's spinner
})  # fmt: skip


def replace_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler for encodings: ASCII for our own characters, escapes for others, the byte itself in a file name."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
        return char.encode("utf-8", "surrogateescape"), error.start + 1
    return char.translate(ASCII_SUBSTITUTES).encode("ascii", "backslashreplace").decode("ascii"), error.start + 1


codecs.register_error(ENCODING_ERRORS, replace_unencodable)


def restart_in_utf8_mode() -> None:
    """Start this process anew in Python's UTF-8 mode where file names are of another encoding.

    Python and its libraries then read and write UTF-8 everywhere, as from 3.15 on by default. What the terminal shows
    keeps the encoding of its locale.
    """
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode:
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def terminal() -> Iterator[None]:
    """Run a program: unencodable text is replaced, a closed pipe ends it quietly, and Ctrl-C ends it with code 130.

    The exit code after a closed pipe is 141, as a shell reports SIGPIPE.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=ENCODING_ERRORS)
    try:
        yield
        sys.stdout.flush()  # at interpreter exit a closed pipe would print a traceback
    except BrokenPipeError:
        if not _is_closed(sys.stdout) and not _is_closed(sys.stderr):
            raise  # of a socket or a pipe to another process
        _discard_output()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        with suppress(OSError):
            print("stopped by SIGINT", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit:
        _flush_or_discard()
        raise


def _is_closed(stream: object) -> bool:
    """Return whether nobody reads what a stream writes any more."""
    if not isinstance(stream, TextIOWrapper):
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # closed, or not a file
        return False


def _flush_or_discard() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    """Send what is still buffered to nowhere: Python flushes it once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_closed(stream):
            os.dup2(nowhere, stream.fileno())
