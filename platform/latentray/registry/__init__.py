"""The registry: evaluation reports, immutable releases, aliases that move between them, and the gates they pass."""
