"""Installs as mgvideo.datasets."""
