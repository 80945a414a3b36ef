"""Handle terminals: characters that an encoding lacks, closed pipes and Ctrl-C. Every program runs inside this."""

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
ASCII_SUBSTITUTES = str.maketrans({  # the non-ASCII characters that mgvideo prints
    **{"×": "x", "·": "-", "–": "-", "—": "-", "−": "-", "±": "+-", "…": "...", "→": "->", "²": "^2", "⁻": "-"},
    **{"τ": "tau", "α": "alpha", "γ": "gamma", "Σ": "sum", "√": "sqrt", "½": "1/2", "¼": "1/4", "≥": ">=", "≤": "<="},
    **{"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'"},
    **{chr(code): "-" for code in range(0x2500, 0x25A0)},  # lines of tables, and of rich's progress bars
    **{chr(code): "." for code in range(0x2800, 0x2900)},  # rich's spinner
})  # fmt: skip


def replace_unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that the encoding lacks: an error handler for `codecs`.

    Characters that mgvideo prints become ASCII, others become escapes, and undecodable bytes of file names stay bytes.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff":  # a byte of a file name that is not UTF-8
        return char.encode("utf-8", "surrogateescape"), error.start + 1
    return char.translate(ASCII_SUBSTITUTES).encode("ascii", "backslashreplace").decode("ascii"), error.start + 1


def restart_in_utf8_mode() -> None:
    """Restart this process in Python's UTF-8 mode if the encoding of file names is not UTF-8.

    Python and its libraries then read and write UTF-8 everywhere, which is the default from Python 3.15 on. Output to
    the terminal keeps the encoding of the locale.
    """
    if sys.getfilesystemencoding() == "utf-8" or sys.flags.utf8_mode:
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@contextmanager
def terminal() -> Iterator[None]:
    """Run a program in a `with` block: replace unencodable text, exit quietly at a closed pipe and at Ctrl-C.

    The exit codes are those by which a shell reports SIGPIPE and SIGINT: 141 and 130.
    """
    codecs.register_error(ENCODING_ERRORS, replace_unencodable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=ENCODING_ERRORS)
    try:
        yield
        sys.stdout.flush()  # flushing a closed pipe at interpreter exit prints a traceback
    except BrokenPipeError:
        if not _is_closed(sys.stdout) and not _is_closed(sys.stderr):
            raise  # it is a socket, or a pipe to another process
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
    """Return whether the stream is a pipe without a reader."""
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
    """Redirect closed streams to /dev/null, because Python flushes their buffers once more at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _is_closed(stream):
            os.dup2(null, stream.fileno())
