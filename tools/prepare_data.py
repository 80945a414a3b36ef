"""Check, encode, list or make a dataset: python tools/prepare_data.py check|pyramid|list|motion [key=value] …"""

if __name__ == "__main__":  # worker processes import this file too: import nothing more there
    from mgvideo.cli import command

    command("prepare")
