"""Print the top classes of videos: python tools/predict.py VIDEO… ckpt=PATH [key=value] …"""

import sys

from mgvideo.cli.predict import main

if __name__ == "__main__":
    main(sys.argv[1:])
