"""Everything that makes training fast on CPUs. A GPU user never needs to read this package.

It has faster convolutions and batch norm, low-priority workers, memory reuse, and the cores and memory available.
"""
