"""Run a table's cells and report them: python tools/reproduce.py table=NAME [preset=NAME] [key=value] …"""

import sys

if __name__ == "__main__":  # loader workers import this file, and need no more of it
    from mgvideo.cli.reproduce import main

    main(sys.argv[1:])
