"""What makes training fast on CPUs: 2-D convolutions, kept memory, cores and cgroups."""
