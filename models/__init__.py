"""The backbones, one family a file. Installs as mgvideo.models."""
