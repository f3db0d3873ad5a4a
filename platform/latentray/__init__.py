"""latentray trains and serves latent diffusion models on Ray.

Importing this package is cheap on purpose: it pulls in neither torch nor Ray. Import the module you need.
"""

__version__ = "0.1.0"
