"""mgvideo: multigrid training of video networks."""

__version__ = "0.1.0"
