"""Run a table's cells and report them: python tools/reproduce.py table=NAME [preset=NAME] [key=value] …"""

import sys

from mgvideo.cli import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])
