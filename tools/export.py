"""Write a trained network as a torch.export or ONNX file: python tools/export.py ckpt=PATH out=FILE [key=value] …"""

from mgvideo.cli import command

if __name__ == "__main__":
    command("export")
