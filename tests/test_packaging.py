"""The wheel works when installed in an environment without the checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from training import ROOT, TINY


def run(*command: object, cwd: Path) -> str:
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_installs_one_package_and_its_command_trains(tmp_path: Path, motion_root: str) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mgvideo"}
    assert any(name.startswith("mgvideo/configs/experiment/kinetics/") for name in names)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, cwd=tmp_path)
    # a .pth file adds the dependencies from the tests' environment, but not its editable mgvideo
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(packages))
    installed = run(python, "-c", "import mgvideo.models; print(mgvideo.models.__file__)", cwd=tmp_path).strip()
    assert Path(installed).is_relative_to(tmp_path)
    overrides = [*TINY, f"dataset.root={motion_root}", "base.epochs=0.25", "base.lr_milestones=[]", "schedule=baseline"]
    printed = run(tmp_path / "env/bin/mgvideo", "run", *overrides, "output_dir=out", "test.enable=false", cwd=tmp_path)
    assert "step 2/2" in printed
    assert (tmp_path / "out/metrics.jsonl").exists()
