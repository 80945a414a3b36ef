"""Print the top classes of videos: python tools/predict.py VIDEO… ckpt=PATH [key=value] …"""

if __name__ == "__main__":  # worker processes import this file too: import nothing more there
    from mgvideo.cli import command

    command("predict")
