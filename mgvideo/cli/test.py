"""`mgvideo test`: test trained weights on a dataset. It needs neither a plan nor the training videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgvideo.distributed.collectives import rank
from mgvideo.distributed.process_group import process_group
from mgvideo.distributed.signals import handle_signals
from mgvideo.distributed.watchdog import Position
from mgvideo.engine.precision import choose_precision
from mgvideo.engine.running_metrics import TrainProgress
from mgvideo.storage.paths import explain_write_errors
from mgvideo.tracking.report import describe_hardware
from mgvideo.tracking.run_logger import RunLogger

from . import app, final_test, keys
from .build import build_data, loader_options
from .schema import key
from .trained import HELP, load_trained


@dataclass
class Keys:
    """Keys of this program, besides those of a run."""

    weights: str | None = key(
        None, "a run's folder (best checkpoint, else newest), a checkpoint, or weights as in init_from"
    )
    out: str = key("test", "folder for the report and the results by video and by class")


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo test` and tools/test.py."""
    if {"-h", "--help"} & set(arguments):
        intro = "Test trained weights: python tools/test.py weights=PATH [dataset.root=FOLDER] [key=value] …"
        print("\n".join([intro, "", *keys.describe(Keys), "", *HELP]))
        return
    own_overrides, run_overrides = keys.split(Keys, arguments)
    with app.exit_on_user_error():
        run(keys.read(Keys, own_overrides), run_overrides)


def run(options: Keys, overrides: Sequence[str]) -> None:
    """Test the weights on the validation videos of the dataset. Every rank calls this."""
    position = Position()
    with handle_signals(), process_group(position) as device:
        trained = load_trained(options.weights, overrides, Keys, "weights")
        cfg, folder = trained.cfg, Path(options.out)
        data = build_data(cfg, train=False)
        precision = choose_precision(cfg.precision, device)
        name = f"{trained.name} on {cfg.dataset.name}"
        progress = TrainProgress()
        progress.record_environment(describe_hardware(device), str(precision))
        model = precision.place(trained.model)
        network = final_test.TestedNetwork(model, name, trained.weights, progress)
        with explain_write_errors("out", folder):
            logger = RunLogger(folder, None, active=rank() == 0)
        try:
            if precision.warning:
                logger.print_line(f"warning: {precision.warning}")
            logger.print_line(trained.load_summary)
            final_test.test_alone(cfg, network, data, precision, logger, position, loader_options(cfg))
        finally:
            logger.close()
