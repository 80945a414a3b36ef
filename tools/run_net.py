"""Train and test a network: python tools/run_net.py [group=option] [key=value] …"""

if __name__ == "__main__":  # worker processes import this file, and need no more of it
    from mgvideo.cli import command

    command("run")
