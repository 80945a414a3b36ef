"""The programs: one module each, which composes a config, builds objects and calls the core."""


def main() -> None:
    """Entry point of the installed command `mgvideo`."""
