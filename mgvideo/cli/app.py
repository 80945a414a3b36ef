"""From a command line to a composed config and a task, with every error of the user's as one line and exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import sys
from argparse import ArgumentError, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import hydra
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from mgvideo.cpu.resources import available_cpus, cpu_count, set_cpu_affinity
from mgvideo.distributed.ranks import limit_threads
from mgvideo.distributed.watchdog import RankError
from mgvideo.errors import UserError
from mgvideo.plan.schedules import scale_lr

from . import values
from .help import group_options, help_text
from .schema import register
from .suggest import suggestion

CONFIGS = "mgvideo.configs"


def main(
    config_name: str,
    description: str,
    task: Callable[[DictConfig], None],
    arguments: Sequence[str],
    more_keys: Sequence[str] = (),
) -> None:
    """Run `task` on the config that `arguments` compose; Hydra's own flags (--cfg, --multirun, …) work as ever.

    `more_keys` are those that the program has taken out of the arguments before: an unknown key may be meant as one.
    """
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug shows its whole traceback; a user's error is one line below
    if {"-h", "--help"} & set(arguments):
        print(help_text(config_name, description))
        return
    with exit_on_user_error():
        flags, overrides, parsed = _flags_and_overrides(config_name, arguments)
        overrides = quote_texts(config_name, overrides, parsed.multirun)
        if not parsed.multirun:
            cfg = check(config_name, overrides, more_keys)
            if parsed.cfg and scale_base(config_name, cfg, overrides):  # Hydra composes it anew
                overrides += [f"base.{key}={cfg.base[key]}" for key in ("lr", "lr_milestones", "warmup_epochs")]

    def guarded(cfg: DictConfig) -> None:
        # the launcher of a multirun, perhaps on another machine, is told of an error by an exception alone
        with exit_on_user_error() if HydraConfig.get().mode is RunMode.RUN else nullcontext():
            set_cpu_affinity(available_cpus())
            limit_threads(cpu_count())
            for line in scale_base(config_name, cfg, HydraConfig.get().overrides.task):
                if os.environ.get("RANK", "0") == "0":
                    print(line, file=sys.stderr)
            task(cfg)

    sys.argv = [sys.argv[0], *flags, *overrides]
    with exit_on_user_error():
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=config_name)(guarded)()


def _flags_and_overrides(config_name: str, arguments: Sequence[str]) -> tuple[list[str], list[str], Namespace]:
    """Hydra's flags and the overrides, in any order, and the flags as Hydra parses them.

    Raises:
        UserError: a flag that does not exist, or one without its value.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        parsed, rest = parser.parse_known_args(list(arguments))
    except ArgumentError as error:
        raise UserError(str(error)) from error
    unknown = next((word for word in rest if word.startswith("-")), None)
    if unknown is not None:
        hint = suggestion(unknown.lstrip("-").partition("=")[0], _all_keys(config_name))
        raise UserError(f"{unknown} is no flag{hint or ':'} Keys are given as key=value")
    overrides = [*parsed.overrides, *rest]
    return [word for word in arguments if word not in overrides], overrides, parsed


def quote_texts(config_name: str, overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """The overrides, with texts quoted that Hydra does not take as they are typed: a path with `=` or a comma."""
    register()

    def composed(plain: Sequence[str]) -> DictConfig:
        with _initialized():
            return compose(config_name, overrides=list(plain), return_hydra_config=True)

    return values.quote_texts(overrides, composed, multirun)


class exit_on_user_error:  # noqa: N801  a context manager, read as a phrase
    """Turns a user's error inside it into one line on stderr and exit code 2, another rank's into code 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        message = explain(error)
        if message is not None:
            rank = os.environ.get("RANK")
            print(f"error: {message}" if rank in (None, "0") else f"error (rank {rank}): {message}", file=sys.stderr)
            raise SystemExit(
                2 if isinstance(error, UserError | HydraException | OmegaConfBaseException) else 1
            ) from None


def explain(error: BaseException | None) -> str | None:
    """The line to print for an error that the user can put right, None for any other."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        node = re.search(r"full_key: (\S+)", str(error))
        error = error.__cause__
        if not isinstance(error, UserError | HydraException | OmegaConfBaseException):
            kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
            return f"{node[1] if node else 'config'}: {kind}{(str(error).splitlines() or [''])[0]}"
    if isinstance(error, UserError | RankError) or type(error).__module__.startswith("submitit."):
        return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("\n"))  # no colours of torch's
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        name = str(error).splitlines()[0].rpartition(" ")[2]  # not full_key, which may only refer to the missing one
        return f"{name} is not set: add {name}=… to the command"
    if isinstance(error, OmegaConfBaseException | HydraException):
        return str(error).splitlines()[0]
    return None


def compose_config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """A config as a program gets it, composed outside hydra.main, for checks, tests and tools.

    Raises:
        UserError: a key or value that does not exist, with the nearest that does.
    """
    overrides = quote_texts(config_name, overrides)
    cfg = check(config_name, overrides, with_hydra=True)
    scale_base(config_name, cfg, overrides)
    return cfg


def _initialized() -> AbstractContextManager:
    """Hydra with our configs: the one that already runs a program, or one for a while."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_module(CONFIGS, version_base="1.3")


def check(
    config_name: str, overrides: Sequence[str], more_keys: Sequence[str] = (), with_hydra: bool = False
) -> DictConfig:
    """Compose the config of the overrides, with or without Hydra's own keys.

    Raises:
        UserError: they do not compose, with the key or value that was meant.
    """
    with _initialized():
        try:
            return compose(config_name, overrides=list(overrides), return_hydra_config=with_hydra)
        except OverrideParseException as error:
            raise UserError(_unreadable(config_name, str(error.override))) from error
        except MissingConfigException as error:
            raise UserError(_unknown_option(error)) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_wrong_override(config_name, overrides, error, more_keys)) from error
        except ValueError as error:  # Hydra's error for a group that is set to nothing
            empty = next((o for o in overrides if o.split("=")[-1] in ("null", "")), None)
            if empty is None:
                raise
            name, _, value = empty.partition("=")
            options = ", ".join(group_options().get(name, []))
            raise UserError(f"{name}={value}: choose one of {options}, or leave it out with ~{name}") from error


def _all_keys(config_name: str) -> list[str]:
    """The keys of the config without any override."""
    with _initialized():
        return list(flat_keys(compose(config_name)))


def _unreadable(config_name: str, override: str) -> str:
    key, is_set, value = override.partition("=")
    if not is_set:
        return f"cannot read '{override}': write it as key=value{suggestion(key, _all_keys(config_name))}"
    return f"cannot read '{override}': {value} is no value for {key}"


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "?").partition("/")
    options = group_options().get(group) or list(error.options or [])
    return f"{group}={option} does not exist{_nearest(option, options)}; there are: {', '.join(options)}"


def _wrong_override(config_name: str, overrides: Sequence[str], error: Exception, more_keys: Sequence[str]) -> str:
    """Find the override at fault by leaving out one at a time."""
    text = str(error)
    ambiguous = re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    if ambiguous:
        return f"{ambiguous[1]}={ambiguous[2]}: give one value, or add --multirun to run them one after another"
    named = re.search(r"(?:Could not override|Error merging override) '?([^'=\s]+)", text) or re.search(
        r"full_key: (\S+)", text
    )
    wrong = named[1] if named else ""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group != wrong:
            continue
        rest = [o for o in overrides if o != override.input_line]
        keys = list(flat_keys(compose(config_name, overrides=rest)))
        if wrong not in keys:
            return f"{wrong} is no key of this config{suggestion(wrong, keys, more_keys)}; --cfg job prints them all"
        return f"{override.input_line}: {str(error.__cause__ or error).splitlines()[0]}"
    return text.splitlines()[0]


def flat_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a config, dotted."""
    for name in map(str, cfg):
        node = cfg._get_node(name)
        yield f"{prefix}{name}"
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            yield from flat_keys(node, f"{prefix}{name}.")


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def scale_base(config_name: str, cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Scale the recipe to a `base.batch_size` or `base.epochs` among the overrides; returns a line for each change.

    base.lr follows base.batch_size by the linear rule, unless it is given too. base.lr_milestones and base.warmup_epochs follow
    base.epochs in proportion, unless one of them is given too.
    """
    keys = {_key_of(override) for override in overrides}
    batch = "base.batch_size" in keys and "base.lr" not in keys
    epochs = "base.epochs" in keys and not keys & {"base.lr_milestones", "base.warmup_epochs"}
    if not (batch or epochs):
        return []
    rest = [override for override in overrides if _key_of(override) not in ("base.batch_size", "base.epochs")]
    with _initialized():
        recipe, base = compose(config_name, overrides=rest).base, cfg.base
    unset = {key for key in ("batch_size", "epochs", "lr") if OmegaConf.is_missing(recipe, key)}  # no recipe to follow
    messages = []
    if batch and not unset & {"batch_size", "lr"}:
        base.lr = scale_lr(recipe.batch_size, recipe.lr, base.batch_size)
        messages.append(
            f"base.lr: {recipe.lr:g} at the recipe's batch of {recipe.batch_size} becomes {base.lr:g} at "
            f"base.batch_size={base.batch_size} (linear rule; set base.lr to choose another)"
        )
    if epochs and "epochs" not in unset and 0 < base.epochs != recipe.epochs:
        factor = base.epochs / recipe.epochs
        base.lr_milestones, base.warmup_epochs = (
            [factor * step for step in recipe.lr_milestones],
            factor * recipe.warmup_epochs,
        )
        messages.append(
            f"base.lr_milestones: {_epochs(recipe.lr_milestones)} of the recipe's {recipe.epochs:g} epochs becomes "
            f"{_epochs(base.lr_milestones)} at base.epochs={base.epochs:g}, and base.warmup_epochs {recipe.warmup_epochs:g} "
            f"becomes {base.warmup_epochs:g} (set either to choose both)"
        )
    return messages


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _epochs(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def same_command(changes: Mapping[str, str], without: Sequence[str] = ()) -> str:
    """The command line that started this run, with other values of some keys and `without` others, to paste in a shell.

    Under torchrun on one node it starts as many ranks. Other launchers (srun, torchrun on several nodes) go before it.
    """
    left_out = {*changes, *without}
    overrides = [o for o in HydraConfig.get().overrides.task if o.split("=")[0].lstrip("+") not in left_out]
    folder = get_args_parser().parse_args(sys.argv[1:]).config_dir
    flags = ["--config-dir", folder] if folder else []
    return shlex.join([*_program(), *flags, *overrides, *(f"{key}={value}" for key, value in changes.items())])


def _program() -> list[str]:
    """The words that start this program, before its own arguments."""
    env, script = os.environ, sys.argv[0]
    python = "python" if shutil.which("python") == sys.executable else _short(sys.executable)
    words = [python]
    if "TORCHELASTIC_RUN_ID" in env and env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"]:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={env['WORLD_SIZE']}"]
    if Path(script).name == "__main__.py":
        return [*words, "-m", "mgvideo.cli", "run"]
    if script.endswith(".py"):
        return [*words, _short(script)]
    if len(words) > 1:
        return [*words, "--no-python", _short(script), "run"]
    return ["mgvideo" if shutil.which("mgvideo") == script else _short(script), "run"]


def _short(path: str) -> str:
    """A path relative to the current folder where it is inside."""
    return os.path.relpath(path) if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()) else path
