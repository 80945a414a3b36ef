"""`mgvideo from_pyslowfast`: print the command that does what a config of PySlowFast does, and what differs."""

from __future__ import annotations

import ast
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from mgvideo.errors import UserError
from mgvideo.plan.plan import require

from . import app, values
from .build import build_plan
from .groups import check_groups
from .help import GROUPS, format_value
from .pyslowfast_keys import DEFAULTS, RULES, find_rule
from .pyslowfast_rules import Translation, equal
from .schema import check_values
from .suggest import option_suggestion

HELP = """Print the command that does what a config of PySlowFast does, then what it could not translate.

python tools/from_pyslowfast.py CONFIG.yaml [KEY VALUE] …

KEY VALUE are PySlowFast's own overrides, such as TRAIN.BATCH_SIZE 16. Its flags --cfg, --num_shards and --opts are read
too. The command is printed only if it composes; nothing is run. All keys: docs/pyslowfast.md."""
LAUNCHER_FLAGS = ("--shard_id", "--init_method")  # of PySlowFast's run_net.py: torchrun and SLURM do this here
WIDTH = 118  # of printed lines
NUMBER_LISTS = ("SOLVER.STEPS", "SOLVER.LRS", "DATA.TRAIN_JITTER_SCALES", "DATA.MEAN", "DATA.STD")
MAX_PASSES = 4  # to add words until the composed config has all values; base.* keys scale with one another


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo from_pyslowfast` and tools/from_pyslowfast.py."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    with app.exit_on_user_error():
        file, overrides = read_arguments(arguments)
        run(file, {**read_config(file), **overrides})


def read_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the config file and the overrides of a command line as PySlowFast takes it.

    Raises:
        UserError: There is no file, or a key without a value.
    """
    words = [word for word in arguments if word not in ("--cfg", "--opts")]
    overrides: dict[str, Any] = {}
    for flag in ("--num_shards", *LAUNCHER_FLAGS):
        if flag in words:
            at = words.index(flag)
            require(at + 1 < len(words), f"{flag} has no value")
            if flag == "--num_shards":
                overrides["NUM_SHARDS"] = _decode(words[at + 1])
            del words[at : at + 2]
    require(bool(words), "give a config of PySlowFast: python tools/from_pyslowfast.py CONFIG.yaml [KEY VALUE] …")
    file, pairs = words[0], words[1:]
    require(len(pairs) % 2 == 0, f"{pairs[-1] if pairs else ''} has no value: write overrides as KEY VALUE")
    for key, text in zip(pairs[::2], pairs[1::2], strict=True):
        _require_key(key, "the command line")
        overrides[key] = _decode(text)
    return file, overrides


def read_config(file: str) -> dict[str, Any]:
    """Read a config of PySlowFast: values by dotted key.

    Raises:
        UserError: The file cannot be read, is not YAML, or has a key that PySlowFast does not have.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        where = f":{place.line + 1}" if place else ""
        raise UserError(f"{file}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    require(isinstance(content, dict), f"{file}: expected blocks of keys such as TRAIN, found {type(content).__name__}")
    settings = {key: _decode(value) for key, value in values.flatten(content).items() if value is not None}
    for key in settings:
        _require_key(key, file)
    return settings


def _require_key(key: str, where: str) -> None:
    hint = option_suggestion(key, [name for name in RULES if "*" not in name])
    require(find_rule(key) is not None, f"{where}: PySlowFast has no key {key}{hint}")


def _decode(value: Any) -> Any:
    """Return a value as PySlowFast reads it: strings that are Python literals become numbers, lists and so on."""
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    return [_decode(item) for item in value] if isinstance(value, list | tuple) else value


def run(file: str, given: Mapping[str, Any]) -> None:
    """Print the command for the settings of a file, then what it does not translate.

    Raises:
        UserError: No command does the same. What exists of the config is printed before.
    """
    settings = {**DEFAULTS, **given}
    _check_types(file, given)
    translations = {key: translate(file, key, settings) for key in (*RULES, *given) if key in settings}
    blocking = [(key, part.reason) for key, part in translations.items() if part.blocks]
    if blocking:
        exists = {key: part.overrides for key, part in translations.items() if key in given and part.overrides}
        _print_section("What exists of this config", [f"{key}: {' '.join(_words(o))}" for key, o in exists.items()])
    else:
        overrides = {key: value for part in translations.values() for key, value in part.overrides.items()}
        command = compose_command(overrides)
        command = [*launcher(settings), *command]
        print(shlex.join(command))
        _print_assumed(translations, given, command)
    _print_untranslated(translations, given)
    if blocking:
        reasons = "; ".join(f"{key}={settings[key]}: {reason}" for key, reason in blocking)
        raise UserError(f"{file}: no command does the same. {reasons}".replace("`", ""))


def translate(file: str, key: str, settings: Mapping[str, Any]) -> Translation:
    """Translate the value of one key. Raises UserError for a value that PySlowFast does not take."""
    rule = find_rule(key)
    assert rule is not None
    try:
        return rule.translate(settings[key], settings)
    except (TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{file}: {key}={settings[key]}: not a value that PySlowFast takes") from error


def _check_types(file: str, given: Mapping[str, Any]) -> None:
    """Raise UserError if a value has another type than PySlowFast's default."""
    names = {bool: "True or False", float: "a number", str: "a word", list: "a list"}
    for key, default in DEFAULTS.items():
        kind = float if type(default) is int else type(default)
        value = given.get(key, default)
        found = float if type(value) is int else type(value)
        require(found is kind, f"{file}: {key}={value}: give {names[kind]}")
        if key in NUMBER_LISTS:
            require(all(type(item) in (int, float) for item in value), f"{file}: {key}={value}: give a list of numbers")


def compose_command(overrides: Mapping[str, Any]) -> list[str]:
    """Return the shortest words with which a run has all of these values, after checking the run as it checks itself.

    Raises:
        UserError: The run would refuse them.
    """
    words = _words({key: value for key, value in overrides.items() if key in GROUPS})
    for _ in range(MAX_PASSES):
        cfg = app.compose_config("run", words)
        chosen = {values.override_key(word) for word in words}
        missing = {key: value for key, value in overrides.items() if key.lstrip("+") not in chosen}
        missing = {key: value for key, value in missing.items() if not _has(cfg, key, value)}
        if not missing:
            break
        words += _words(missing)
    wrong = [key for key, value in overrides.items() if key.lstrip("+") not in GROUPS and not _has(cfg, key, value)]
    require(not wrong, f"the command would not set {', '.join(wrong)}; please report this")
    check_values(cfg)
    check_groups(cfg)
    build_plan(cfg, max(cfg.dataset.get("train_videos") or 0, 1000 * cfg.base.batch_size))
    return words


def _has(cfg: DictConfig, key: str, value: Any) -> bool:
    """Return whether a composed config has a value, or has chosen an option of a group."""
    if key in GROUPS:
        return cfg.hydra.runtime.choices.get(key) == value
    try:
        found = OmegaConf.select(cfg, key.lstrip("+"))
    except InterpolationResolutionError:  # the default of output_dir exists only in a running program
        return False
    return equal(OmegaConf.to_container(found) if OmegaConf.is_config(found) else found, value)


def _words(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as words of a command."""
    return [
        f"{key}={value if isinstance(value, str) else format_value(value).replace(', ', ',').replace(': ', ':')}"
        for key, value in overrides.items()
    ]


def launcher(settings: Mapping[str, Any]) -> list[str]:
    """Return the words before the overrides: torchrun for several GPUs, and the run program."""
    gpus, machines = settings["NUM_GPUS"], settings["NUM_SHARDS"]
    is_script = sys.argv[0].endswith(".py") and Path(sys.argv[0]).name != "__main__.py"
    if gpus * machines <= 1:
        return ["python", "tools/run_net.py"] if is_script else ["mgvideo", "run"]
    # PySlowFast's own launcher needs the address of the first machine too
    several = [f"--nnodes={machines}", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:29500"] if machines > 1 else []
    program = ["tools/run_net.py"] if is_script else ["-m", "mgvideo.cli", "run"]
    return ["torchrun", *several, f"--nproc-per-node={gpus}", *program]


def _print_assumed(translations: Mapping[str, Translation], given: Mapping[str, Any], command: Sequence[str]) -> None:
    """Print the defaults of PySlowFast from which words of the command come, and what to fill in."""
    lines = []
    for key, part in translations.items():
        words = [word for word in _words(part.overrides) if word in command]
        if key not in given and words and key not in ("MODEL.ARCH", "TRAIN.DATASET", "MULTIGRID.LONG_CYCLE"):
            lines.append(f"{key}={DEFAULTS[key]}: {' '.join(words)}")
    if "TRAIN.MIXED_PRECISION" not in given:
        lines.append(
            "TRAIN.MIXED_PRECISION=False: precision=auto stays, which is bf16 or fp16 on a GPU; add precision=fp32 "
            "to train in float32 as PySlowFast does"
        )
    if "dataset.root=FOLDER" in command:
        lines.append("DATA.PATH_TO_DATA_DIR is not set: replace FOLDER by the dataset's folder")
    if any("HOST:" in word for word in command):
        lines.append("run the command on each machine, and replace HOST by the name of the first one")
    _print_section("Defaults of PySlowFast that the file leaves open", lines)


def _print_untranslated(translations: Mapping[str, Translation], given: Mapping[str, Any]) -> None:
    """Print the keys that are not translated, or differ, with the reason; keys with one reason together."""
    by_reason: dict[str, list[str]] = {}
    for key, part in translations.items():
        if part.reason and (key in given or not part.reason.startswith("has no effect")):
            by_reason.setdefault(part.reason, []).append(key)
    lines = [f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items()]
    _print_section("Not translated, or different", lines)


def _print_section(title: str, lines: Iterable[str]) -> None:
    """Print a title and lines below it, wrapped; nothing if there are no lines."""
    lines = [line.replace("`", "") for line in lines]
    if lines:
        print(f"\n{title}:")
    for line in lines:
        print(textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False))
