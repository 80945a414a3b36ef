"""Installs as mgvideo.models."""
