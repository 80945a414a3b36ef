"""Check, encode, list or make a dataset: python tools/prepare_data.py check|pyramid|list|motion [key=value] …"""

import sys

from mgvideo.cli.prepare import main

if __name__ == "__main__":
    main(sys.argv[1:])
