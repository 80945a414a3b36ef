"""Measure the loader, a training step or the trainer: python tools/benchmark.py loader [group=option] [key=value] …"""

if __name__ == "__main__":  # worker processes import this file too: import nothing more there
    from mgvideo.cli import command

    command("benchmark")
