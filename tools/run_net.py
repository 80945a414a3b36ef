"""Train and test a network: python tools/run_net.py [group=option] [key=value] …"""

import sys

from mgvideo.cli.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
