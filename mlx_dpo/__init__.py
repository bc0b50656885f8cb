"""Direct Preference Optimization on MLX."""

__version__ = "0.1.0"
