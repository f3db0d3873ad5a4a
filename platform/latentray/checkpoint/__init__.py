"""Artifacts: folders at a URI, whose manifest is written last and holds the sha256 of every file."""
