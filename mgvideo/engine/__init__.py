"""Training and evaluation: trainer, train step, micro-batches, tasks, optimizers and precision."""
