"""mgvideo: multigrid training of video networks."""

from mgvideo.cpu import resources as _resources  # noqa: F401  reads the CPUs of this process before torch is imported

__version__ = "0.1.0"
