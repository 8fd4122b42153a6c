"""Define the mathematics of the model and its kernels."""
