"""Evaluation: metrics, the networks whose features they compare, and what reads a picture without a network."""
