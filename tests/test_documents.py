"""The keys, options, links and files that pages name exist, and the imports of their Python examples work."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from documents import CONFIGS, PAGES, blocks, spans
from omegaconf import OmegaConf
from training import ROOT

from mgvideo.cli import app, export, features, plan, predict, prepare, reproduce
from mgvideo.cli.benchmark import index as benchmark_index
from mgvideo.cli.benchmark import loader as benchmark_loader
from mgvideo.cli.benchmark import soak as benchmark_soak
from mgvideo.cli.benchmark import step as benchmark_step
from mgvideo.cli.benchmark import train as benchmark_train
from mgvideo.cli.groups import DatasetKeys
from mgvideo.cli.help import GROUPS, group_options
from mgvideo.cli.schema import RunKeys
from mgvideo.datasets.motion import Knobs
from mgvideo.plan.options import ScheduleOptions

SECTIONS = (
    *("base", "train", "test", "sampling", "loader", "checkpoint"),
    *("normalize", "dataset", "schedule", "model", "optimizer"),
)
PROGRAM_KEYS = [
    plan.PlanKeys, reproduce.ReproduceKeys, predict.PredictKeys, features.FeatureKeys, export.ExportKeys,
    benchmark_loader.Keys, benchmark_index.Keys, benchmark_step.Keys, benchmark_train.Keys, benchmark_soak.Keys, Knobs,
    *(command.keys for command in prepare.COMMANDS.values()),
]  # fmt: skip


@cache
def known_keys() -> frozenset[str]:
    """Return every key of a run with any choice of groups, and the keys of the other programs."""
    keys = {*app.flat_keys(OmegaConf.structured(RunKeys)), *GROUPS, "preset", "table"}
    for path in CONFIGS:
        group = path.relative_to(ROOT / "configs").parts[0]
        if group in RunKeys.__dataclass_fields__:
            is_global = path.read_text(encoding="utf-8").startswith("# @package _global_")
            keys |= {*app.flat_keys(OmegaConf.load(path), "" if is_global else f"{group}.")}
    keys |= {f"dataset.{each.name}" for each in fields(DatasetKeys)}
    keys |= {f"schedule.{each.name}" for each in fields(ScheduleOptions)}
    for program in PROGRAM_KEYS:
        keys |= {each.name for each in fields(program)}
    return frozenset(keys)


def named_keys(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the keys that are inline code of a page on their own, each with its value or an empty string."""
    for span in spans(path.read_text(encoding="utf-8")):
        words = span.split()
        if all(re.match(r"[+~]?[a-z][\w./]*=", word) for word in words):
            yield from (word.lstrip("+~").partition("=")[::2] for word in words)
        elif re.fullmatch(rf"(?:{'|'.join(SECTIONS)})\.[a-z_.]+[a-z]", span) and not re.search(
            r"\.(?:csv|tsv|json|safetensors|\w+l)$", span
        ):
            yield span, ""


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_named_keys_and_options_exist(page: Path) -> None:
    options = group_options()
    for key, value in named_keys(page):
        assert key in known_keys() or key.startswith("hydra."), f"no program has the key {key}"
        if key in options and re.fullmatch(r"[a-z]\w*", value):
            assert value in options[key] or key == "launcher", f"{key}={value} does not exist"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=str)
def test_link_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: *(\S+)", text, re.M):
        target, _, heading = "".join(link).partition("#")
        if re.match(r"\w+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not heading or heading in headings(path), f"{target}#{heading}"


def headings(path: Path) -> set[str]:
    """Return the anchors of a page as GitHub makes them."""
    lines = re.findall(r"^#+ +(.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_named_files_exist(page: Path) -> None:
    for span in spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(?:mgvideo|models|datasets|configs|tools|tests|docs)/[\w./-]*\w/?", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("picture", sorted(ROOT.glob("docs/images/*.png")), ids=lambda picture: picture.name)
def test_pictures_are_small_and_shown(picture: Path) -> None:
    assert picture.stat().st_size < 150_000, "a clone downloads all pictures"
    assert any(f"images/{picture.name}" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=str)
def test_python_examples_compile_and_import(page: Path) -> None:
    for language, lines in blocks(page.read_text(encoding="utf-8")):
        if language == "python":
            tree = ast.parse("\n".join(lines))
            tree.body = [line for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
            exec(compile(tree, str(page), "exec"), {})
