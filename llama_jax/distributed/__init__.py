"""Set up jax and its processes, lay out the mesh, place arrays on it and store them."""
