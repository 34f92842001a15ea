"""Small modules that take numbers, never a configuration."""
