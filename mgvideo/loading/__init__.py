"""Build batches on the host from a plan: clip requests, sampler, loader and worker processes."""
