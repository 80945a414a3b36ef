"""`python -m mgvideo.cli PROGRAM …`: the installed command, wherever the package is, under torchrun too."""

from . import command

if __name__ == "__main__":
    command()
