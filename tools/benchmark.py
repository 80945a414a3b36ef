"""Measure, as ratios within one run: python tools/benchmark.py loader [group=option] [key=value] …"""

import sys

from mgvideo.cli.benchmark import main

if __name__ == "__main__":
    main(sys.argv[1:])
