"""Single-device networks: tensors in, tensors out. No noise, no Ray, no files."""
