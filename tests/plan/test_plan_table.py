"""Tables and figure of plans."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from PIL import Image
from recipes import CHARADES, KINETICS, KINETICS_CLIPS, SCHEDULES, SSV2
from rich.console import Console, RenderableType

from mgvideo.plan.figure import draw_plans
from mgvideo.plan.forecast import Benchmark, predict_phase_times
from mgvideo.plan.plan import Base
from mgvideo.plan.schedules import multigrid
from mgvideo.plan.table import make_loader_demand_table, make_plan_table


def render(table: RenderableType) -> str:
    console = Console(file=StringIO(), width=80, soft_wrap=True)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("base", [KINETICS, CHARADES, SSV2], ids=["kinetics", "charades", "something"])
def test_the_widest_table_fits_120_columns_without_cut_cells(base: Base) -> None:
    plan = multigrid(base, KINETICS_CLIPS)
    seconds = {slot.grid.name: 0.5 for phase in plan.phases for slot in phase.slots}
    text = render(make_plan_table(plan, 8, times=predict_phase_times(plan, 8, Benchmark(seconds))))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    assert "…" not in text


def test_a_row_of_the_plan_table() -> None:
    text = render(make_plan_table(multigrid(KINETICS, KINETICS_CLIPS), 8))
    row = next(line for line in text.splitlines() if "110–142" in line)
    cells = [
        "3",
        "16×224²",
        "112",
        "158",
        "224",
        "512",
        "256",
        "128",
        "64",
        "32",
        "16",
        "sub",
        "2",
        "110–142",
        "25,714",
    ]
    assert row.split() == [*cells, "0.2", "9.8%"]
    assert "saving: 3.42× fewer steps, 3.43× fewer pixels" in text


def test_a_row_of_the_loader_demand_table() -> None:
    plan = multigrid(KINETICS, KINETICS_CLIPS)
    names = {slot.grid.name for phase in plan.phases for slot in phase.slots}
    benchmark = Benchmark(dict.fromkeys(names, 0.5), dict.fromkeys(names, 100.0))
    rows = render(make_loader_demand_table(plan, 8, benchmark)).splitlines()
    cells = next(row for row in rows if "8×158²" in row).split()
    assert cells[1:7] == ["1,", "5,", "9", "0.5", "s", "1,365"]  # 2048 clips in three steps of 0.5 s
    assert cells[-1] == "41%"


def test_the_figure_is_a_small_png_with_many_colours(tmp_path: Path) -> None:

    path = tmp_path / "plan.png"
    draw_plans([schedule(KINETICS, KINETICS_CLIPS) for schedule in SCHEDULES], path)
    with Image.open(path) as image:
        assert image.width >= 1000
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 50
    assert path.stat().st_size < 150_000
