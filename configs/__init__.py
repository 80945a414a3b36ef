"""The Hydra configs. Installed as mgvideo.configs."""
