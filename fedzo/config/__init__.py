"""The typed configuration and its strict loading with Hydra."""
