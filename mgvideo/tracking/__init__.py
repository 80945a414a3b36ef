"""What a run logs and reports: progress bar, TensorBoard, report and profiler."""
