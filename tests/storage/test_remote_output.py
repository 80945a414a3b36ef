"""Runs with data, weights and output_dir at URLs, and RemoteOutput by itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from training import KNOBS, TINY, end_state, metrics, start_program
from web import Bucket, serve_folder, serve_s3

from mgvideo.cli.run import main
from mgvideo.datasets.motion import make_motion
from mgvideo.errors import UserError
from mgvideo.models.small import r2plus1d_small
from mgvideo.storage.checkpoints import Checkpoints
from mgvideo.storage.paths import register_handler
from mgvideo.storage.remote_output import INDEX, RemoteOutput

RUN = [
    *(argument for argument in TINY if "knobs" not in argument),
    *("dataset=kinetics400", "dataset.num_classes=8", "loader.num_workers=0", "test.enable=false"),
    *("precision=fp32", "checkpoint.every_steps=2", "train.precise_bn_clips=0", "train.micro_batch_clips=16"),
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    bucket = Bucket(tmp_path_factory.mktemp("bucket"))
    register_handler(bucket)
    return bucket


@pytest.fixture(autouse=True)
def _empty_folder_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    bucket.broken = False


def test_a_run_on_remotes_resumes_from_its_remote(tmp_path: Path, motion_root: str, bucket: Bucket) -> None:
    shutil.copytree(make_motion(motion_root, KNOBS), tmp_path / "served")
    torch.save({"model": r2plus1d_small(8, width=4).state_dict()}, tmp_path / "served/weights.pt")
    with serve_folder(tmp_path / "served") as (address, requested):
        run = [*RUN, f"dataset.root={address}", f"init_from={address}/weights.pt"]
        main([*run, "output_dir=bucket://runs/a"])
        assert requested.count("/weights.pt") == 1
        assert requested.count("/train/00000.mp4") == 1, "it is read many times and fetched once"
        whole = Path("runs/remote/bucket/runs/a")
        steps = Checkpoints(whole / "checkpoints").steps()
        for name in ("report.md", "metrics.jsonl", "plan.json", f"checkpoints/step_{steps[-1]:08d}.pt"):
            expected = (whole / name).read_bytes() if (whole / name).exists() else None
            copy = bucket.folder / "runs/a" / name
            assert (copy.read_bytes() if copy.exists() else None) == expected, name
        # resume on a machine without local files, from a remote whose newest checkpoint was deleted
        shutil.copytree(bucket.folder / "runs/a", bucket.folder / "runs/b")
        (bucket.folder / f"runs/b/checkpoints/step_{steps[-1]:08d}.pt").unlink()
        main([*run, "output_dir=bucket://runs/b"])
        resumed = Path("runs/remote/bucket/runs/b")
        assert end_state(resumed)["tensors"] == end_state(whole)["tensors"]
        assert metrics(resumed) == metrics(whole)
        shutil.copytree(whole / "checkpoints", tmp_path / "served/checkpoints")
        main([*run, f"resume={address}/checkpoints/step_{steps[-2]:08d}.pt", "output_dir=c"])
        assert end_state(Path("c"))["tensors"] == end_state(whole)["tensors"]


@pytest.mark.slow
def test_a_run_on_s3_resumes(tmp_path: Path, motion_root: str) -> None:
    videos = Path(make_motion(motion_root, KNOBS))
    with serve_s3("videos") as (client, environment):
        for file in (path for path in videos.rglob("*") if path.is_file()):
            client.upload_file(str(file), "videos", f"my data/{file.relative_to(videos)}")
        run = [*RUN, "dataset.root=s3://videos/my data", "loader.num_workers=2", "output_dir=s3://videos/runs/a"]
        whole, resumed = (Path(f"runs/remote/s3/{name}") for name in ("first", "videos/runs/a"))
        run_net(run, environment, tmp_path)
        resumed.rename(whole)
        newest = f"checkpoints/step_{Checkpoints(whole / 'checkpoints').steps()[-1]:08d}.pt"
        client.delete_object(Bucket="videos", Key=f"runs/a/{newest}")
        run_net(run, environment, tmp_path)
        client.download_file("videos", f"runs/a/{newest}", "newest.pt")
    assert end_state(resumed)["tensors"] == end_state(whole)["tensors"]
    assert metrics(resumed) == metrics(whole)
    assert Path("newest.pt").read_bytes() == (resumed / newest).read_bytes()


def run_net(overrides: list[str], environment: dict[str, str], folder: Path) -> None:
    process = start_program(*overrides, log=folder / "log", environment=environment)
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()


def save_checkpoints(mirror: RemoteOutput, *steps: int) -> None:
    checkpoints = Checkpoints(mirror.folder / "checkpoints", keep=2, on_write=mirror.push)
    for step in steps:
        checkpoints.save(step, {"weights": torch.ones(3), "progress": {"step": step}}, best=step == 1)
    checkpoints.wait()


def test_the_remote_mirrors_the_folder_and_restores_it(bucket: Bucket) -> None:
    mirror = RemoteOutput("bucket://mirrored")
    with mirror.synced():
        save_checkpoints(mirror, 1, 2, 3, 4)
        (mirror.folder / "elsewhere.log").symlink_to(Path("elsewhere.log").absolute())  # not copied
    names = {path.name for path in (bucket.folder / "mirrored/checkpoints").iterdir()}
    assert names == {f"step_0000000{step}.{suffix}" for step in (1, 3, 4) for suffix in ("pt", "sha256")}
    modified_ns = {path: path.stat().st_mtime_ns for path in (bucket.folder / "mirrored/checkpoints").iterdir()}
    shutil.rmtree(mirror.folder)
    with (restored := RemoteOutput("bucket://mirrored/")).synced():
        checkpoints = Checkpoints(restored.folder / "checkpoints")
        newest, warnings = checkpoints.find_newest()
        assert newest == checkpoints.path(4)
        assert not warnings
        assert os.readlink(checkpoints.best) == "step_00000001.pt"
        assert restored.source(newest) == "bucket://mirrored/checkpoints/step_00000004.pt"
    assert {path: path.stat().st_mtime_ns for path in modified_ns} == modified_ns, "an unchanged file is not copied"


def test_an_unreachable_remote_is_a_warning_and_is_updated_later(bucket: Bucket, capsys: pytest.CaptureFixture) -> None:
    mirror = RemoteOutput("bucket://shaky")
    with mirror.synced():
        save_checkpoints(mirror, 1)
        bucket.broken = True
        save_checkpoints(mirror, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: cannot write to bucket://shaky: ")
        assert str(mirror.folder) in line
        bucket.broken = False
    assert (bucket.folder / "shaky/checkpoints/step_00000002.pt").exists()


def test_a_truncated_copy_is_named_and_the_checkpoint_before_it_is_used(bucket: Bucket) -> None:
    mirror = RemoteOutput("bucket://cut")
    with mirror.synced():
        save_checkpoints(mirror, 1, 2)
    os.truncate(bucket.folder / "cut/checkpoints/step_00000002.pt", 100)
    shutil.rmtree(mirror.folder)
    with (restored := RemoteOutput("bucket://cut")).synced():
        checkpoints = Checkpoints(restored.folder / "checkpoints")
        newest, warnings = checkpoints.find_newest()
        assert newest == checkpoints.path(1)
        assert "step_00000002.pt is damaged" in warnings[0]


def test_an_unwritable_or_hostile_remote_is_a_user_error(tmp_path: Path, bucket: Bucket) -> None:
    with serve_folder(tmp_path) as (address, _), pytest.raises(UserError, match=r"output_dir=http.*: cannot be used"):
        RemoteOutput(f"{address}/run").synced().__enter__()
    (bucket.folder / "evil").mkdir()
    (bucket.folder / "evil" / INDEX).write_text(json.dumps({"files": {"../../../stolen": [1, 1]}, "links": {}}))
    with pytest.raises(UserError, match="outside of the run"):
        RemoteOutput("bucket://evil").synced().__enter__()


def test_a_local_output_dir_is_used_directly(tmp_path: Path) -> None:
    for address in ("runs/x", f"file://{tmp_path}/runs/x"):
        mirror = RemoteOutput(address)
        assert mirror.folder.resolve() == tmp_path / "runs/x"
        with mirror.synced():
            assert mirror.source(mirror.folder / "a") == str(mirror.folder / "a")
