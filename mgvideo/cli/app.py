"""Compose a config from the command line and run a task on it. Each user error is one line and exit code 2."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from argparse import ArgumentError, Namespace
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from mgvideo.distributed.process_group import limit_threads
from mgvideo.distributed.watchdog import RankError
from mgvideo.errors import UserError, print_error
from mgvideo.plan.drafts import lr_factor_of_batch

from . import values
from .help import group_options, help_text
from .recipe import fill_clip
from .schema import register
from .suggest import option_suggestion, suggestion
from .sweep import SweptRun, print_sweep
from .values import override_key

CONFIGS = "mgvideo.configs"
MAX_ADAM_LR = 0.01  # larger ones are for SGD: published recipes of AdamW and LAMB have 1e-4 to 8e-3
MAX_PUBLISHED_LR = 3.2  # of the linear rule: Goyal et al., arXiv 1706.02677, at a batch of 8,192 images


def main(
    config_name: str,
    description: str,
    task: Callable[[DictConfig], None],
    arguments: Sequence[str],
    more_keys: Sequence[str] = (),
) -> None:
    """Run `task` on the config that `arguments` compose. Hydra's own flags (--cfg, --multirun, …) work as usual.

    `more_keys` are keys that the program has already removed from the arguments. The error message for an unknown key
    also suggests these.
    """
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # full tracebacks for bugs; user errors become one line below
    if {"-h", "--help"} & set(arguments):
        with exit_on_user_error():
            print(help_text(description, _config_for_help(config_name, arguments, more_keys)))
        return
    with exit_on_user_error():
        flags, overrides, parsed = _flags_and_overrides(config_name, arguments)
        overrides = quote_texts(config_name, overrides, parsed.multirun)
        if not parsed.multirun:
            cfg = check(config_name, overrides, more_keys)
            if parsed.cfg and scale_base(config_name, cfg, overrides):  # Hydra composes the config again
                scaled = ("lr", "lr_milestones", "warmup_epochs")
                overrides += [f"base.{key}={cfg.base[key]}" for key in scaled if cfg.base[key] is not None]

    swept_runs: list[SweptRun] = []  # of a sweep in this process

    def run_task(cfg: DictConfig) -> None:
        # In a multirun the launcher, which may be on another machine, needs the exception itself.
        with exit_on_user_error() if HydraConfig.get().mode is RunMode.RUN else nullcontext():
            set_cpu_affinity(available_cpus())
            limit_threads(cpu_count())
            fill_clip(cfg)
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                swept_runs.append(SweptRun(tuple(HydraConfig.get().overrides.task), Path(cfg.output_dir)))
            for line in scale_base(config_name, cfg, [*_search_path(), *HydraConfig.get().overrides.task]):
                if os.environ.get("RANK", "0") == "0":
                    print(line, file=sys.stderr)
            task(cfg)

    sys.argv = [sys.argv[0], *flags, *overrides]
    try:
        with exit_on_user_error():
            hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=config_name)(run_task)()
    finally:
        if os.environ.get("RANK", "0") == "0":
            print_sweep(swept_runs)


def _config_for_help(config_name: str, arguments: Sequence[str], more_keys: Sequence[str]) -> DictConfig:
    """Compose the config whose keys `--help` lists, with Hydra's own keys; for a sweep, that of the defaults."""
    _, overrides, parsed = _flags_and_overrides(config_name, arguments)
    chosen = [] if parsed.multirun else quote_texts(config_name, overrides)
    return check(config_name, chosen, more_keys, with_hydra=True)


def _flags_and_overrides(config_name: str, arguments: Sequence[str]) -> tuple[list[str], list[str], Namespace]:
    """Split arguments, in any order, into Hydra's flags, overrides, and the flags as Hydra parses them.

    Raises:
        UserError: A flag does not exist or lacks its value, or the folder of `--config-dir` does not exist.
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
        raise UserError(f"{unknown} is not a flag{hint}; write keys as key=value")
    overrides = [*parsed.overrides, *rest]
    flags = [word for word in arguments if word not in overrides]
    if parsed.config_dir is not None:
        overrides = [_search_path_override(parsed.config_dir, overrides), *overrides]
    return flags, overrides, parsed


def _search_path_override(folder: str, overrides: Sequence[str]) -> str:
    """Return the override that adds the folder of `--config-dir` where configs are composed without Hydra's flags.

    Raises:
        UserError: The folder does not exist, or `overrides` set `hydra.searchpath` too.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder")
    if any(override_key(override) == "hydra.searchpath" for override in overrides):
        raise UserError("give --config-dir or hydra.searchpath=[FOLDER, …], not both")
    return f"hydra.searchpath=[{values.quote(f'file://{Path(folder).absolute()}')}]"


def quote_texts(config_name: str, overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """Return the overrides, with quotes around strings that Hydra would misread, such as a path with `=` or a comma."""
    register()

    def compose_overrides(readable: Sequence[str]) -> DictConfig:
        with _initialized():
            return compose(config_name, overrides=list(readable), return_hydra_config=True)

    return values.quote_texts(overrides, compose_overrides, multirun)


class exit_on_user_error:  # noqa: N801  a context manager, read as a phrase
    """Exit with one line on stderr after an error that the user can fix.

    The exit code is 2 for errors in arguments, config or data, 1 for other errors, such as the failure of another rank.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        message = explain(error)
        if message is not None:
            print_error(message, os.environ.get("RANK") or 0)
            raise SystemExit(
                2 if isinstance(error, UserError | HydraException | OmegaConfBaseException) else 1
            ) from None


def explain(error: BaseException | None) -> str | None:
    """Return the one-line message for an error that the user can fix, None for any other error."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        node = re.search(r"full_key: (\S+)", str(error))
        error = error.__cause__
        if not isinstance(error, UserError | HydraException | OmegaConfBaseException):
            kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
            return f"{node[1] if node else 'config'}: {kind}{(str(error).splitlines() or [''])[0]}"
    if isinstance(error, UserError | RankError) or type(error).__module__.startswith("submitit."):
        return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split("\n"))  # without the terminal colours of torch
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        name = str(error).splitlines()[0].rpartition(" ")[2]  # full_key may be a key that only refers to the unset one
        return f"{name} is not set: add {name}=… to the command"
    if isinstance(error, OmegaConfBaseException | HydraException):
        return str(error).splitlines()[0]
    return None


def compose_config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose a config as a program receives it, outside hydra.main, for checks, tests and tools.

    Raises:
        UserError: A key or value does not exist. The message suggests the most similar one.
    """
    overrides = quote_texts(config_name, overrides)
    cfg = check(config_name, overrides, with_hydra=True)
    if "model_option" in cfg:
        cfg.model_option = cfg.hydra.runtime.choices.get("model")  # its resolver requires a running program
    fill_clip(cfg)
    scale_base(config_name, cfg, overrides)
    return cfg


def _initialized() -> AbstractContextManager:
    """Initialise Hydra with our configs for a `with` block, unless a running program has already done so."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_module(CONFIGS, version_base="1.3")


def check(
    config_name: str, overrides: Sequence[str], more_keys: Sequence[str] = (), with_hydra: bool = False
) -> DictConfig:
    """Compose the config of the overrides, with or without Hydra's own keys.

    Raises:
        UserError: The overrides do not compose. The message suggests the key or value that was meant.
    """
    with _initialized():
        try:
            return compose(config_name, overrides=list(overrides), return_hydra_config=with_hydra)
        except OverrideParseException as error:
            raise UserError(_explain_unreadable(config_name, str(error.override))) from error
        except MissingConfigException as error:
            raise UserError(_explain_unknown_option(error)) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_explain_override(config_name, overrides, error, more_keys)) from error
        except ValueError as error:  # Hydra raises it for an empty group
            empty = next((o for o in overrides if o.split("=")[-1] in ("null", "")), None)
            if empty is None:
                raise
            name, _, value = empty.partition("=")
            options = ", ".join(group_options().get(name, []))
            raise UserError(f"{name}={value}: choose one of {options}, or leave it out with ~{name}") from error


def _all_keys(config_name: str) -> list[str]:
    """Return the keys of the config without any override."""
    with _initialized():
        return list(flat_keys(compose(config_name)))


def _explain_unreadable(config_name: str, override: str) -> str:
    """Return the message for an override that Hydra cannot parse."""
    key, is_set, value = override.partition("=")
    if not is_set:
        return f"cannot read '{override}': write it as key=value{suggestion(key, _all_keys(config_name))}"
    return f"cannot read '{override}': {value} is not a valid value of {key}"


def _explain_unknown_option(error: MissingConfigException) -> str:
    """Return the message for an option that its config group does not have."""
    group, _, option = (error.missing_cfg_file or "?").partition("/")
    options = group_options().get(group) or list(error.options or [])
    return f"{group}={option} does not exist{option_suggestion(option, options)}; choose one of {', '.join(options)}"


def _explain_override(config_name: str, overrides: Sequence[str], error: Exception, more_keys: Sequence[str]) -> str:
    """Return the message for the override that made composing fail with `error`."""
    text = str(error)
    ambiguous = re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text)
    if ambiguous:
        return f"{ambiguous[1]}={ambiguous[2]}: give one value, or add --multirun to run them one after another"
    key_match = re.search(r"(?:Could not override|Error merging override) '?([^'=\s]+)", text) or re.search(
        r"full_key: (\S+)", text
    )
    wrong_key = key_match[1] if key_match else ""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group != wrong_key:
            continue
        rest = [o for o in overrides if o != override.input_line]
        keys = list(flat_keys(compose(config_name, overrides=rest)))
        if wrong_key not in keys:
            hint = suggestion(wrong_key, keys, more_keys)
            return f"{wrong_key} is not a key of this config{hint}; --cfg job prints all keys"
        return f"{override.input_line}: {str(error.__cause__ or error).splitlines()[0]}"
    return text.splitlines()[0]


def flat_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield every key of a config, as dotted names."""
    for name in map(str, cfg):
        node = cfg._get_node(name)
        yield f"{prefix}{name}"
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            yield from flat_keys(node, f"{prefix}{name}.")


def scale_base(config_name: str, cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Scale the recipe in `cfg` if the overrides set `base.batch_size` or `base.epochs`; return a line for each change.

    base.lr scales with base.batch_size by the optimizer's rule, `recipe.lr_scaling`, unless the overrides set it.
    base.lr_milestones and base.warmup_epochs scale linearly with base.epochs, unless the overrides set one of them.
    """
    keys = {override_key(override) for override in overrides}
    rule = cfg.recipe.lr_scaling
    scales_lr = "base.batch_size" in keys and "base.lr" not in keys and rule != "none"
    scales_epochs = "base.epochs" in keys and not keys & {"base.lr_milestones", "base.warmup_epochs"}
    if not (scales_lr or scales_epochs):
        return _sgd_lr_warning(cfg, keys)
    rest = [override for override in overrides if override_key(override) not in ("base.batch_size", "base.epochs")]
    with _initialized():
        recipe, base = compose(config_name, overrides=rest).base, cfg.base
    # keys that no recipe sets, or that are computed later
    unset = {key for key in recipe if OmegaConf.is_missing(recipe, key) or recipe[key] is None}
    messages = []
    if scales_lr and not unset & {"batch_size", "lr"} and base.batch_size > 0:
        base.lr = recipe.lr * lr_factor_of_batch(base.batch_size / recipe.batch_size, rule)
        messages.append(
            f"base.lr: {recipe.lr:g} at the recipe's batch of {recipe.batch_size} becomes {base.lr:g} at "
            f"base.batch_size={base.batch_size} ({rule} rule; set base.lr to choose another)"
        )
        messages += _large_lr_warning(cfg) if rule == "linear" else _sgd_lr_warning(cfg, keys)
    if scales_epochs and not unset & {"epochs", "lr_milestones", "warmup_epochs"} and 0 < base.epochs != recipe.epochs:
        factor = base.epochs / recipe.epochs
        base.lr_milestones = [factor * milestone for milestone in recipe.lr_milestones]
        base.warmup_epochs = factor * recipe.warmup_epochs
        messages.append(
            f"base.lr_milestones: {_epochs(recipe.lr_milestones)} of the recipe's {recipe.epochs:g} epochs becomes "
            f"{_epochs(base.lr_milestones)} at base.epochs={base.epochs:g}, and base.warmup_epochs "
            f"{recipe.warmup_epochs:g} becomes {base.warmup_epochs:g} (set either to choose both)"
        )
    return messages


def _sgd_lr_warning(cfg: DictConfig, keys: Collection[str]) -> list[str]:
    """Return a warning if an optimizer like AdamW gets the recipe's LR, which is for SGD."""
    base = cfg.base
    if cfg.recipe.lr_scaling != "sqrt" or "base.lr" in keys or OmegaConf.is_missing(base, "lr") or base.lr is None:
        return []
    if base.lr <= MAX_ADAM_LR:
        return []
    return [
        f"warning: base.lr={base.lr:g} of the recipe is for SGD, and too large for this optimizer: set base.lr, for "
        "example to 1e-3"
    ]


def _large_lr_warning(cfg: DictConfig) -> list[str]:
    """Return a warning if the LR that the linear rule gives exceeds `MAX_PUBLISHED_LR` in some phase."""
    factor = _largest_lr_factor(cfg.schedule)
    if cfg.base.lr * factor <= MAX_PUBLISHED_LR:
        return []
    product = f" ({cfg.base.lr:g}, times {factor} for the coarsest clips)" if factor > 1 else ""
    return [
        f"warning: base.batch_size={cfg.base.batch_size} raises the LR to {cfg.base.lr * factor:.3g}{product}, and the "
        f"largest published for the linear rule is {MAX_PUBLISHED_LR:g}: set a smaller base.lr or base.batch_size"
    ]


def _largest_lr_factor(schedule: DictConfig) -> int:
    """Return the largest factor by which the long cycle multiplies the LR, 1 without one."""
    if not (schedule.get("lr_scaling") == "linear" and schedule.get("long_factors")):
        return 1
    try:
        return max(round(1 / (frames * size**2)) for frames, size in schedule.long_factors)
    except (TypeError, ValueError, ZeroDivisionError):  # the schedule reports factors that are invalid
        return 1


def chosen_keys() -> set[str]:
    """Return the keys and groups that the command of the running program sets."""
    return {override_key(override) for override in HydraConfig.get().overrides.task}


def _epochs(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def same_command(changes: Mapping[str, str], without: Sequence[str] = ()) -> str:
    """Return the command line of this run with `changes` to keys and `without` others, quoted for a shell.

    Under torchrun on one node the command starts the same number of ranks. For other launchers (srun, torchrun on
    several nodes) it is the command that follows the launcher.
    """
    replaced = {*changes, *without}
    overrides = [o for o in HydraConfig.get().overrides.task if override_key(o) not in replaced]
    changed = [f"{key}={value}" for key, value in changes.items()]
    return shlex.join([*_program(), *_search_path(), *overrides, *changed])


def _search_path() -> list[str]:
    """Return the overrides of the running program that add folders of configs."""
    return [override for override in HydraConfig.get().overrides.hydra if override_key(override) == "hydra.searchpath"]


def predict_command(video: str, ckpt: str) -> str:
    """Return the command line that predicts a video with the weights of this run, quoted for a shell."""
    script = sys.argv[0]
    if Path(script).name == "__main__.py":
        words = [_python(), "-m", "mgvideo.cli", "predict"]
    elif script.endswith(".py"):
        words = [_python(), _short(str(Path(script).with_name("predict.py")))]
    else:
        words = ["mgvideo" if shutil.which("mgvideo") == script else _short(script), "predict"]
    return shlex.join([*words, video, f"ckpt={ckpt}"])


def _python() -> str:
    return "python" if shutil.which("python") == sys.executable else _short(sys.executable)


def _program() -> list[str]:
    """Return the words of the command line that come before the program's own arguments."""
    env, script = os.environ, sys.argv[0]
    words = [_python()]
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
    """Return a path relative to the current folder if it is inside."""
    return os.path.relpath(path) if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()) else path
