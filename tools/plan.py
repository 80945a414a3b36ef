"""Show the plan of a run before paying for it: python tools/plan.py [group=option] [key=value] …"""

import sys

if __name__ == "__main__":  # loader workers import this file, and need no more of it
    from mgvideo.cli.plan import main

    main(sys.argv[1:])
