"""Measure, as ratios within one run: python tools/benchmark.py loader [group=option] [key=value] …"""

import sys

if __name__ == "__main__":  # worker processes import this file, and need no more of it
    from mgvideo.cli import main

    main(["benchmark", *sys.argv[1:]])
