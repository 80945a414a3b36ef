"""Check the one-line error message that a program exits with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def error_line(
    main: Callable[[list[str]], None], arguments: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 2
) -> str:
    """Run `main`, which must exit with `code`, and return its only line on stderr.

    Lines that report a scaled recipe (`base.lr: …`, `base.lr_milestones: …`) do not count.
    """
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == code, lines
    (line,) = [line for line in lines if not line.startswith(("base.lr: ", "base.lr_milestones: "))]
    return line
