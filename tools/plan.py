"""Show the plan and cost of a run before starting it: python tools/plan.py [group=option] [key=value] …"""

from mgvideo.cli import command

if __name__ == "__main__":
    command("plan")
