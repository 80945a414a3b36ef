"""`--help` lists the keys of the chosen options, with values and the comments of their YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgvideo.cli import plan
from mgvideo.cli.run import main
from mgvideo.cli.yaml_keys import YamlKey, read_choices, read_option_keys, read_summary


def help_lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    main(["--help", *arguments])
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_help_lists_the_keys_of_the_default_options(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_lines(capsys)
    assert "optimizer.weight_decay L2 penalty [0.0001]" in lines
    assert "model.dropout dropout probability before the last linear layer [0.0]" in lines
    assert "normalize.mean mean per channel, for pixels in 0–1 [0.45, 0.45, 0.45]" in lines
    assert any(line.startswith("dataset.frame_cache folder for decoded frames") for line in lines)
    assert any(line.endswith("both ends [scaled]") for line in lines), "the value is the recipe's, not the file's"
    assert not any(line.startswith(("model.depth", "model._target_", "dataset.train.root")) for line in lines)


def test_help_lists_the_keys_of_the_chosen_options(capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_lines(
        capsys, "model=slowfast_nln_8x8_r50", "dataset=ucf101", "schedule=baseline", "model.dropout=0.25"
    )
    assert "model.dropout dropout probability before the last linear layer [0.25]" in lines
    assert "model.depth layers of the ResNet: 50 or 101 [50]" in lines
    assert any(line.endswith("follows [{res3: [1, 3], res4: [1, 3, 5]}]") for line in lines)
    assert "dataset.root folder of the dataset, or its URL" in lines, "a key that is not set has no value"
    assert "dataset.fold which of the three official splits: 1, 2 or 3 [1]" in lines
    assert "schedule.epoch_factor epochs as a multiple of base.epochs [1.0]" in lines


def test_help_of_other_programs_lists_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--help", "schedule=short", "videos=100"])
    assert "schedule.short_factors" in capsys.readouterr().out


def test_help_of_a_sweep_lists_the_default_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert any(line.startswith("schedule=multigrid: ") for line in help_lines(capsys, "-m", "schedule=short,long"))


def test_help_for_an_unknown_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help", "model=i3d_r5"])
    assert capsys.readouterr().err.startswith("error: model=i3d_r5 does not exist, did you mean i3d_r50?")


def write(folder: Path, option: str, text: str) -> None:
    file = folder / f"{option}.yaml"
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(text, encoding="utf-8")


def test_help_lists_the_keys_of_options_outside_the_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "schedule/mine", "# Mine.\ndefaults: [multigrid]\nname: mine\nshort: false\nmin_size: 48\n")
    lines = help_lines(capsys, f"hydra.searchpath=[{tmp_path}]", "schedule=mine")
    assert "schedule=mine: Mine." in lines
    assert "schedule.min_size smallest crop that the network supports, in pixels [48]" in lines


def test_comments_are_read_from_all_places(tmp_path: Path) -> None:
    write(tmp_path, "common", "# of every option\nshared: null  # above all\n")
    write(tmp_path, "group/base", "# The base.\n#\n# Details.\na: 1  # first\nb: 2\n# in two\n# lines\nc: [1, 2]\n")
    write(
        tmp_path,
        "group/option",
        "# The option\n# of two lines.\ndefaults: [base, /common@_here_, {override /model: i3d}, _self_]\n"
        "_target_: somewhere\nb: '# no comment'  # second\na: 3\nreference: ${group.a}\n"
        "inner: &inner\n  x: {y: 1}  # a value\n  z: 1  # last\nother: {<<: *inner, z: 2}\n",
    )
    keys = read_option_keys("group/option", [tmp_path])
    assert [*keys.values()] == [
        YamlKey("group.b", "'# no comment'", "second"),
        YamlKey("group.a", "3", "first"),
        YamlKey("group.inner.x", "{y: 1}", "a value"),
        YamlKey("group.inner.z", "1", "last"),
        YamlKey("group.other.z", "2", "last"),
        YamlKey("group.other.x", "{y: 1}", "a value"),
        YamlKey("group.shared", "null", "above all"),
        YamlKey("group.c", "[1, 2]", "in two lines"),
    ]
    assert read_summary(tmp_path / "group/base.yaml") == "The base."
    assert read_choices(tmp_path / "group/option.yaml") == {"model": "i3d"}


def test_keys_of_the_global_package_have_no_prefix(tmp_path: Path) -> None:
    write(tmp_path, "recipe/mine", "# @package _global_\n# Mine.\nbase:\n  lr: 0.1\n")
    assert read_option_keys("recipe/mine", [tmp_path]) == {"base.lr": YamlKey("base.lr", "0.1", "")}
    assert read_summary(tmp_path / "recipe/mine.yaml") == "Mine."
