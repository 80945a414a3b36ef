"""The backbones, one family in each file. Installed as mgvideo.models."""
