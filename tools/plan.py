"""Show the plan of a run before paying for it: python tools/plan.py [group=option] [key=value] …"""

import sys

from mgvideo.cli import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
