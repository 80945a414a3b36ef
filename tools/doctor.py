"""Check this machine before training: python tools/doctor.py [format=json] [group=option] [key=value] …"""

from mgvideo.cli import command

if __name__ == "__main__":
    command("doctor")
