"""Run the cells of a table and report the results: python tools/reproduce.py table=NAME [preset=NAME] [key=value] …"""

from mgvideo.cli import command

if __name__ == "__main__":
    command("reproduce")
