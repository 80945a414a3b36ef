"""Run `python -m mgvideo.cli PROGRAM …`: the command `mgvideo` from any folder, also under torchrun."""

from . import command

if __name__ == "__main__":
    command()
