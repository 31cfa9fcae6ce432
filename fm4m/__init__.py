"""fm4m: 4M-style massively multimodal masked pretraining in JAX, sized for TPU pods."""

__version__ = "0.1.0"
