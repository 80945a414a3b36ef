"""Layers that replace layers of a network in training: group batch norm, per-clip dropout and drop path."""
