"""mgvideo: multigrid training of video networks.

Importing it records the CPUs of this process: importing torch may bind the main thread to one of them (OpenMP).
"""

from mgvideo.cpu import resources as _resources  # noqa: F401

__version__ = "0.1.0"
