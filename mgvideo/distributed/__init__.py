"""Starting and joining ranks, collective operations, the watchdog and signals."""
