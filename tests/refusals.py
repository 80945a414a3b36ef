"""What a program says when it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def said(
    main: Callable[[list[str]], None], arguments: Sequence[str], capsys: pytest.CaptureFixture[str], code: int = 2
) -> str:
    """The one line on stderr that a program exits with, besides what it prints of a scaled recipe."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == code, lines
    (line,) = [line for line in lines if not line.startswith(("base.lr: ", "base.lr_milestones: "))]
    return line
