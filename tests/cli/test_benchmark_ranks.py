"""`mgvideo benchmark ranks`: simulated ranks start the same collective operations, and a difference is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from refusals import error_line
from training import TINY

from mgvideo.cli import app
from mgvideo.cli.benchmark import main
from mgvideo.cli.benchmark.ranks import Collective, SimulatedRank, first_difference, read_keys, run
from mgvideo.engine import evaluation, train_step
from mgvideo.engine.micro_batches import MicroBatch, split_into_micro_batches
from mgvideo.plan.shards import BatchShard

WORLD = 16
CONFIG = [*TINY, "base.batch_size=32", "precision=fp32", "loader.num_workers=0", "train.micro_batch_clips=2"]
OPTIONS = [f"world={WORLD}", "videos=2048"]


def test_the_first_and_the_last_rank_agree_through_a_long_cycle(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    run(read_keys([*OPTIONS, "format=json", f"out={out}"]), app.compose_config("run", CONFIG))
    first, last = json.loads(out.read_text())["ranks"]
    assert (first["rank"], last["rank"]) == (0, WORLD - 1)
    assert first["collectives"] == last["collectives"]
    names = {name for name, *_ in first["collectives"]}
    assert names >= {"allreduce", "allgather_base", "broadcast", "new_group"}
    assert {slot["phase"] for slot in first["slots"]} == {1, 2, 3, 4}
    for slot, other in zip(first["slots"], last["slots"], strict=True):
        assert slot["clips"] == other["clips"] == slot["batch"] // WORLD
        assert {**slot, "cpu_ms": None} == {**other, "cpu_ms": None}
        shared = slot["bn_ranks"] > 1
        assert (slot["collectives"] > 30) == shared, "batch norm exchanges statistics if ranks share a group"
    assert {slot["bn_ranks"] for slot in first["slots"]} == {1, 2, 4}
    assert all(slot["cpu_ms"] > 0 for slot in last["slots"])
    assert not dist.is_initialized()


@pytest.mark.parametrize("module", [train_step, evaluation])
@pytest.mark.slow
def test_ranks_that_would_hang_are_reported(
    module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def split_differently_on_last_rank(shard: BatchShard, limit: int) -> list[MicroBatch]:
        return split_into_micro_batches(shard, 1 if dist.get_rank() == WORLD - 1 else limit)

    monkeypatch.setattr(module, "split_into_micro_batches", split_differently_on_last_rank)
    with pytest.raises(SystemExit) as stop:
        main(["ranks", *OPTIONS, *CONFIG])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]  # others: progress
    assert f"rank 0 and rank {WORLD - 1} differ at collective operation" in line


def test_operations_differ_by_name_group_size_dtype_or_values() -> None:
    same = Collective("allreduce", 8, "torch.float32", 100)
    objects = Collective("allgather_base", 8, "torch.uint8", 100)

    def differ(a: list[Collective], b: list[Collective]) -> bool:
        return first_difference([SimulatedRank(0, [], a), SimulatedRank(7, [], b)]) is not None

    assert not differ([same, objects], [same, objects._replace(values=90)])
    for change in ({"name": "broadcast"}, {"ranks": 4}, {"dtype": "torch.float64"}, {"values": 90}):
        assert differ([objects, same], [objects, same._replace(**change)])
    assert differ([same], [same, same])
    assert differ([same, objects], [objects, same])


@pytest.mark.parametrize(
    ("argument", "words"),
    [("world=1", "world=1"), ("ranks=[200]", "ranks=[200]"), ("visits=0", "visits=0"), ("world=48", "48 ranks")],
)
def test_invalid_arguments_give_one_error_line(argument: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in error_line(main, ["ranks", argument, *CONFIG], capsys)
