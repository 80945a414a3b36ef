"""`python -m mgvideo.cli PROGRAM …`: the installed command, wherever the package is, under torchrun too."""

from . import main

if __name__ == "__main__":
    main()
