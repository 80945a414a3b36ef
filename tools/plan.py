"""Show the plan of a run before paying for it: python tools/plan.py [group=option] [key=value] …"""

from mgvideo.cli import command

if __name__ == "__main__":
    command("plan")
