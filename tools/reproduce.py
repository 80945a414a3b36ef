"""Run a table's cells and report them: python tools/reproduce.py table=NAME [preset=NAME] [key=value] …"""

from mgvideo.cli import command

if __name__ == "__main__":
    command("reproduce")
