"""Show the plan of a run before paying for it: python tools/plan.py [group=option] [key=value] …"""

import sys

from mgvideo.cli.plan import main

if __name__ == "__main__":
    main(sys.argv[1:])
