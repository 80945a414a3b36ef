"""Everything that makes training fast on CPUs: faster convolutions, memory reuse, and the cores and memory available.

A GPU user never needs to read this package.
"""
