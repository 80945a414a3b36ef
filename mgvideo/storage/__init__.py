"""Checkpoints, paths and URLs, and output folders on a remote file system."""
