"""The mathematics of diffusion: pure functions of tensors, no networks, no files."""
