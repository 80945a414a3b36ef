"""From a command line to a composed config and a task, with every error of the user's as one line and exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

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

from mgvideo.errors import UserError
from mgvideo.schedule import scale_lr
from mgvideo.watch import RankError

from .help import group_options, help_text
from .schema import register

CONFIGS = "mgvideo.configs"


def main(config_name: str, description: str, task: Callable[[DictConfig], None], arguments: Sequence[str]) -> None:
    """Run `task` on the config that `arguments` compose; Hydra's own flags (--cfg, --multirun, …) work as ever."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug shows its whole traceback; a user's error is one line below
    if {"-h", "--help"} & set(arguments):
        print(help_text(config_name, description))
        return
    flags = get_args_parser().parse_args(list(arguments))
    if not flags.multirun:
        with reported():
            cfg = check(config_name, flags.overrides)
            if flags.cfg and scale_base(config_name, cfg, flags.overrides):  # Hydra prints its own composition
                scaled = {key: cfg.base[key] for key in ("lr", "lr_steps", "warmup_epochs")}
                arguments = [*arguments, *(f"base.{key}={value}" for key, value in scaled.items())]

    def guarded(cfg: DictConfig) -> None:
        # the launcher of a multirun, perhaps on another machine, is told of an error by an exception alone
        with reported() if HydraConfig.get().mode is RunMode.RUN else nullcontext():
            for line in scale_base(config_name, cfg, HydraConfig.get().overrides.task):
                if os.environ.get("RANK", "0") == "0":
                    print(line, file=sys.stderr)
            task(cfg)

    sys.argv = [sys.argv[0], *arguments]
    with reported():
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=config_name)(guarded)()


class reported:  # noqa: N801  a context manager, read as a phrase
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
        return " ".join(str(error).split("\n"))
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
    register()
    cfg = check(config_name, overrides, with_hydra=True)
    scale_base(config_name, cfg, overrides)
    return cfg


def _initialized() -> AbstractContextManager:
    """Hydra with our configs: the one that already runs a program, or one for a while."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_module(CONFIGS, version_base="1.3")


def check(config_name: str, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """The config that the overrides compose, with or without Hydra's own keys.

    Raises:
        UserError: they do not compose, with the nearest key or value that would.
    """
    with _initialized():
        try:
            return compose(config_name, overrides=list(overrides), return_hydra_config=with_hydra)
        except OverrideParseException as error:
            raise UserError(f"cannot read '{error.override!s}': write it as key=value") from error
        except MissingConfigException as error:
            raise UserError(_unknown_option(error)) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_wrong_override(config_name, overrides, error)) from error
        except ValueError as error:  # what Hydra says of a group that is set to nothing
            name, _, value = next(o for o in overrides if o.split("=")[-1] in ("null", "")).partition("=")
            options = ", ".join(group_options().get(name, []))
            raise UserError(f"{name}={value}: choose one of {options}, or leave it out with ~{name}") from error


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "?").partition("/")
    options = group_options().get(group) or list(error.options or [])
    return f"{group}={option} does not exist{_nearest(option, options)}; there are: {', '.join(options)}"


def _wrong_override(config_name: str, overrides: Sequence[str], error: Exception) -> str:
    """Find the override at fault by leaving out one at a time."""
    text = str(error)
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
            return f"{wrong} is no key of this config{_nearest(wrong, keys)}; --cfg job prints them all"
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
    """Scale the recipe to a `base.batch` or `base.epochs` among the overrides; returns a line for each change.

    base.lr follows base.batch by the linear rule, unless it is given too. base.lr_steps and base.warmup_epochs follow
    base.epochs in proportion, unless one of them is given too.
    """
    keys = {_key_of(override) for override in overrides}
    batch = "base.batch" in keys and "base.lr" not in keys
    epochs = "base.epochs" in keys and not keys & {"base.lr_steps", "base.warmup_epochs"}
    if not (batch or epochs):
        return []
    rest = [override for override in overrides if _key_of(override) not in ("base.batch", "base.epochs")]
    with _initialized():
        recipe, base = compose(config_name, overrides=rest).base, cfg.base
    unset = {key for key in ("batch", "epochs", "lr") if OmegaConf.is_missing(recipe, key)}  # no recipe to follow
    messages = []
    if batch and not unset & {"batch", "lr"}:
        base.lr = scale_lr(recipe.batch, recipe.lr, base.batch)
        messages.append(
            f"base.lr: {recipe.lr:g} at the recipe's batch of {recipe.batch} becomes {base.lr:g} at "
            f"base.batch={base.batch} (linear rule; set base.lr to choose another)"
        )
    if epochs and "epochs" not in unset and 0 < base.epochs != recipe.epochs:
        factor = base.epochs / recipe.epochs
        base.lr_steps, base.warmup_epochs = [factor * step for step in recipe.lr_steps], factor * recipe.warmup_epochs
        messages.append(
            f"base.lr_steps: {_epochs(recipe.lr_steps)} of the recipe's {recipe.epochs:g} epochs becomes "
            f"{_epochs(base.lr_steps)} at base.epochs={base.epochs:g}, and base.warmup_epochs {recipe.warmup_epochs:g} "
            f"becomes {base.warmup_epochs:g} (set either to choose both)"
        )
    return messages


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _epochs(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"
