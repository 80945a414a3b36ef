"""Write a trained network as a torch.export or ONNX file: python tools/export.py ckpt=PATH out=FILE [key=value] …"""

import sys

if __name__ == "__main__":  # loader workers import this file, and need no more of it
    from mgvideo.cli.export import main

    main(sys.argv[1:])
