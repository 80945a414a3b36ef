"""Installs as mgvideo.configs."""
