"""Print the top classes of videos: python tools/predict.py VIDEO… ckpt=PATH [key=value] …"""

import sys

if __name__ == "__main__":  # worker processes import this file, and need no more of it
    from mgvideo.cli import main

    main(["predict", *sys.argv[1:]])
