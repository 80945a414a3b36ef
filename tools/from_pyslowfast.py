"""Print the command for a config of PySlowFast: python tools/from_pyslowfast.py CONFIG.yaml [KEY VALUE] …"""

if __name__ == "__main__":
    from mgvideo.cli import command

    command("from_pyslowfast")
