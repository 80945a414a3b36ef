"""Test trained weights on a dataset: python tools/test.py weights=PATH [key=value] …"""

if __name__ == "__main__":  # worker processes import this file too: import nothing more there
    from mgvideo.cli import command

    command("test")
