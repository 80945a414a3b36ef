"""Check this machine before training: python tools/doctor.py [format=json] [group=option] [key=value] …"""

import sys

if __name__ == "__main__":  # worker processes import this file too: import nothing more there
    from mgvideo.cli.doctor import main

    main(sys.argv[1:])
