"""mgvideo: multigrid training of video networks."""

# Records the CPUs of this process before torch is imported, which may bind the main thread to a single one (OpenMP).
from mgvideo.cpu import resources as _resources  # noqa: F401

__version__ = "0.1.0"
