"""Training: the loop, its checkpoints and metrics; DeepSpeed is behind `train.zero`."""
