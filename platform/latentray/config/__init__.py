"""Configuration: one dataclass file per job or group, checked in `__post_init__`; `compose` alone imports Hydra."""
