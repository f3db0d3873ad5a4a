"""Training: the loop of one worker, the DeepSpeed engine under it, and its launch on Ray."""
