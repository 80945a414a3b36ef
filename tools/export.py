"""Write a trained network as a torch.export or ONNX file: python tools/export.py ckpt=PATH out=FILE [key=value] …"""

import sys

from mgvideo.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
