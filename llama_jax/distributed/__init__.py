"""Mesh, placement, processes and the settings of jax."""
