"""docs/configuration.md has every key and option that the code and the YAML files declare."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest

from mgvideo.cli.configuration_page import MARKER, PAGE, PROGRAM_KEYS, make_page
from mgvideo.cli.help import GROUPS, default_of, group_options
from mgvideo.cli.schema import RunKeys
from mgvideo.cli.yaml_keys import CONFIGS, find_option, read_option_keys, read_summary

GROUPS_WITH_COMMENTS = ("model", "dataset", "schedule", "optimizer", "decoder", "launcher")


@pytest.fixture(scope="module")
def page() -> str:
    return make_page(PAGE.read_text(encoding="utf-8"))


def test_the_committed_page_is_up_to_date(page: str) -> None:
    committed = PAGE.read_text(encoding="utf-8")
    assert committed == page, "docs/configuration.md differs from the code and the YAML files: run `make docs`"


def test_the_text_above_the_marker_is_kept(page: str) -> None:
    head = PAGE.read_text(encoding="utf-8").partition(MARKER)[0]
    assert make_page("# Head\n").startswith(f"# Head\n\n{MARKER}\n")
    assert page.startswith(head)
    assert make_page(page) == page


def test_every_key_of_a_run_has_a_row(page: str) -> None:
    names = []
    for field in fields(RunKeys):
        block = default_of(field)
        names += [f"{field.name}.{inner.name}" for inner in fields(block)] if is_dataclass(block) else [field.name]
    groups = {"model", "dataset", "schedule", "optimizer", "decoder"}
    assert [name for name in names if name not in groups and f"\n| `{name}` | " not in page] == []


def test_a_row_has_type_limits_default_and_meaning(page: str) -> None:
    row = "| `loader.prefetch_factor` | int ≥ 1 | `2` | batches that each worker loads in advance |"
    assert row in page
    assert "| `precision` | `auto`, `fp32`, `bf16`, `fp16` | `auto` | " in page
    assert "| `train.micro_batch_clips` | int ≥ 1 or null | `null` | " in page
    assert "| `normalize.std` | list of 3 float > 0 | `[0.225, 0.225, 0.225]` | " in page
    assert "| `base.batch_size` | int or null | set by the recipe | " in page
    assert "| `output_dir` | str | `runs/${hydra:runtime.choices.dataset}/" in page


def test_every_option_and_its_keys_have_a_row(page: str) -> None:
    for group, options in group_options().items():
        section = page.partition(f"\n### {group}=\n")[2].partition("\n### ")[0]
        assert [option for option in options if f"| `{option}` |" not in section] == []
    assert "| `model.fusion_kernel` | `5`: " in page
    assert "| `dataset.val.list_file` | `val.csv`: kinetics400, kinetics600, kinetics700 | list of paths" in page
    assert "| `optimizer.weight_decay` | `${recipe.weight_decay}`: sgd | L2 penalty |" in page
    assert "| `schedule.epoch_factor` | `1.5`; `1.0`: baseline | epochs as a multiple of base.epochs |" in page


def test_keys_of_other_programs_have_a_row(page: str) -> None:
    for program, keys_class in PROGRAM_KEYS.items():
        section = page.partition(f"\n### {program}\n")[2].partition("\n### ")[0]
        assert [field.name for field in fields(keys_class) if f"| `{field.name}` |" not in section] == []
    assert "\n### benchmark loader\n" in page


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_starts_with_a_comment(group: str) -> None:
    for option in group_options()[group]:
        file = find_option(f"{group}/{option}")
        assert file is not None
        assert read_summary(file), f"{file.relative_to(CONFIGS)} has no comment at its top that says what it is"


@pytest.mark.parametrize("group", GROUPS_WITH_COMMENTS)
def test_every_key_of_an_option_has_a_comment(group: str) -> None:
    for option in group_options()[group]:
        for key in read_option_keys(f"{group}/{option}").values():
            assert key.comment, f"configs/{group}/{option}.yaml: {key.name} has no comment"
