"""Measure, as ratios within one run: python tools/benchmark.py loader [group=option] [key=value] …"""

if __name__ == "__main__":  # worker processes import this file, and need no more of it
    from mgvideo.cli import command

    command("benchmark")
