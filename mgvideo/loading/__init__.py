"""From a plan to batches on the host: clip requests, sampler, loader and worker processes."""
