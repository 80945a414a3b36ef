"""Write the pooled features of videos: python tools/features.py VIDEO… ckpt=PATH out=FOLDER [key=value] …"""

if __name__ == "__main__":  # worker processes import this file too: import nothing more there
    from mgvideo.cli import command

    command("features")
