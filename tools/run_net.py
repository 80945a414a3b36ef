"""Train and test a network: python tools/run_net.py [group=option] [key=value] …"""

if __name__ == "__main__":  # worker processes import this file too: import nothing more there
    from mgvideo.cli import command

    command("run")
