"""Start ranks and join their process group; collective operations, the watchdog and signals."""
