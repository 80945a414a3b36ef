"""Override values that Hydra's grammar would misread, such as paths with special characters, arrive as typed."""

from __future__ import annotations

import os
import random
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from refusals import error_line
from training import ROOT

from mgvideo.cli import app, keys, plan
from mgvideo.cli.predict import PredictKeys
from mgvideo.cli.run import main
from mgvideo.cli.tables import compose_entries, load_table
from mgvideo.cli.trained import run_config
from mgvideo.cli.values import quote

ODD = [
    *("/d/a=b", "/d/epoch=3-step=9.ckpt", "null=", "/d/a,b", "a,b", "x,", "[x]", "/d/a[1].pt", "a]", "{a}"),
    *("/d/(x) y", "a)", "(a", "it's", '"q"x', "/d/é", "/d/видео/動画", "😀.pth", "a—b", "a‑b", "#x", "/d/#1", "a;b"),
    *("a&b", "a!b", "a<b>", "a^b", "`a`", "/d/a:b", "a: b", " a ", "a\tb", "a\nb", "$HOME/x", "*.pt", "@a", "a@b"),
    *("range(1,3)", "glob(*)", "choice(a,b)", "sort(a", "/d/\udcd0x", "/d/a%20b", "%a", "-a", "--a"),
    *("- a", "? a", "| a", "&a", "!a", "a\\b", "\\", "a\\'"),
]
NUMBERS = ["1e5", "1_000", "007", "12", "true", "1.50", "inf"]  # these may also be names of files


def select(cfg: object, key: str) -> object:
    return OmegaConf.select(cfg, key)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ODD)
def test_path_arrives_as_typed(text: str) -> None:
    keys_of_strings = ("output_dir", "init_from", "resume", "dataset.root", "dataset.pyramid", "dataset.train.split")
    cfg = app.compose_config("run", [f"{key}={text}" for key in keys_of_strings])
    assert {key: select(cfg, key) for key in keys_of_strings} == dict.fromkeys(keys_of_strings, text)


def test_string_that_looks_like_a_number_stays_a_string() -> None:
    for text in NUMBERS:
        assert app.compose_config("run", [f"output_dir={text}", f"init_from={text}"]).output_dir == text
        assert app.compose_config("run", [f"dataset.root={text}"]).dataset.root == text


def test_curly_quotes_around_a_value_are_no_part_of_it() -> None:
    for override in ("dataset.root=“/d/a=b”", "dataset.root=‘/d/a=b’"):
        assert app.compose_config("run", [override]).dataset.root == "/d/a=b"


def test_hydra_reads_any_quoted_string_unchanged() -> None:
    draw = random.Random(0)
    letters = [*"ab=,[](){}'\"\\ \t$~#:;!@%^&*?|<>`+-/.\n", "é", "動", "😀", "\udcd0", "\r", "\u2028"]
    for _ in range(500):
        text = "".join(draw.choice(letters) for _ in range(draw.randint(1, 8)))
        assert OverridesParser.create().parse_override(f"key={quote(text)}").value() == text


def test_hydra_syntax_still_works() -> None:
    cases = {
        "dataset.root='/d/a b'": "/d/a b",
        'dataset.root="/d/a=b"': "/d/a=b",
        "dataset.root=/d/a\\,b": "/d/a,b",
        "dataset.root=/d/a=b/${seed}": "/d/a=b/3",
        "init_from=null": None,
        "init_from='null'": "null",
        "base.short_side=[36,40]": [36, 40],
        "dataset.knobs.sizes=[0.1,0.2]": [0.1, 0.2],
        "++dataset.root=/d/a=b": "/d/a=b",
        "+dataset.more=/d/a=b": "/d/a=b",
        "+dataset.more=[a,b]": ["a", "b"],
        "model=i3d_small": 8,
    }
    for override, expected in cases.items():
        key = override.split("=")[0].lstrip("+").replace("model", "model.num_classes")
        cfg = app.compose_config("run", [override, "seed=3"])
        assert select(cfg, key) == expected, override


def test_commas_are_a_sweep_with_multirun_and_an_error_without(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["schedule=baseline,multigrid", "seed=0,1", "init_from=a.pt,b.pt", "dataset.root=/d/a=1,/d/a=2"]
    quoted = app.quote_texts("run", words, multirun=True)
    assert quoted == [*words[:3], "dataset.root='/d/a=1','/d/a=2'"]
    assert OverridesParser.create().parse_override(quoted[3]).is_sweep_override()
    assert error_line(main, ["seed=0,1"], capsys) == (
        "error: seed=0,1: give one value, or add --multirun to run them one after another"
    )


def test_leading_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x y")
    assert app.compose_config("run", ["dataset.root=~/a=b"]).dataset.root == "/home/x y/a=b"
    assert keys.read(PredictKeys, ["ckpt=~/a=b"]).ckpt == "/home/x y/a=b"


def test_malformed_numbers_and_lists_are_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("base.batch_size=1=2", "base.short_side=[36,40", "dataset.knobs.sizes=[0.1"):
        assert error_line(main, [wrong], capsys).startswith(f"error: cannot read '{wrong}'")
    for wrong in ("gpus=[", "videos={", "at=[1"):
        assert wrong.split("=")[0] in error_line(plan.main, [wrong], capsys)


def test_odd_strings_and_flags_work_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    main(["dataset.root=/d/a=b, [c] 'é' #1", "--cfg", "job", "init_from=epoch=3-step=9.ckpt"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["dataset"]["root"] == "/d/a=b, [c] 'é' #1"
    assert printed["init_from"] == "epoch=3-step=9.ckpt"


@pytest.mark.parametrize("text", [*ODD, *NUMBERS, "01:30", "2023-01-01", "on", "0x10", "~x", "{a: 1}"])
def test_keys_of_a_program_accept_odd_strings(text: str) -> None:
    options = keys.read(PredictKeys, [f"ckpt={text}", f"classes={text}", "top=3", "cam=true"])
    assert (options.ckpt, options.classes, options.top, options.cam) == (text, text, 3, True)


def test_keys_of_a_program_may_be_quoted_or_null() -> None:
    options = keys.read(PredictKeys, ["ckpt='a b'", 'classes="it\'s"', "size=null", "out=null"])
    assert (options.ckpt, options.classes, options.size, options.out) == ("a b", "it's", None, None)


def test_saved_config_accepts_odd_strings(tmp_path: Path) -> None:
    cfg = app.compose_config("run", ["output_dir=out"])
    saved = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    OmegaConf.save(saved, tmp_path / "config.yaml", resolve=True)
    for text in ODD:
        overrides = [f"dataset.root={text}", f"dataset.pyramid={text}", "base.short_side=[36,40]", "base.lr=1e-3"]
        read = run_config(tmp_path / "config.yaml", overrides, PredictKeys)
        assert (read.dataset.root, read.dataset.pyramid) == (text, text)
        assert (list(read.base.short_side), read.base.lr) == ([36, 40], 0.001)


def test_runs_of_a_table_accept_odd_strings(tmp_path: Path) -> None:
    root = os.fspath(tmp_path / "a=b, [c]")
    (cell, *_) = compose_entries(
        load_table("schedules", "motion"), app.quote_texts("run", [f"dataset.root={root}"]), None
    )
    assert cell.config.dataset.root == root
    parsed = OverridesParser.create().parse_overrides(cell.overrides)
    assert not any(override.is_sweep_override() for override in parsed), "a comma in a path is not a sweep"


def test_commands_on_the_configuration_page_print_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (?:\$ )?python tools/(\w+)\.py (.*)\n(?:    (error: .*))?", page, re.MULTILINE)
    assert len(commands) == 5
    for program, words, error in commands:
        run = {"run_net": main, "plan": plan.main}[program]
        if error:
            assert error_line(run, shlex.split(words), capsys) == error
        else:
            run(shlex.split(words))
            assert capsys.readouterr().out
