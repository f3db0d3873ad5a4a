"""Whole pipelines between latentray's model folders and the ecosystem's: diffusers' folders, single files, the hub."""
