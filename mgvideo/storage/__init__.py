"""Checkpoints, paths and URLs, and output folders on remote file systems."""
