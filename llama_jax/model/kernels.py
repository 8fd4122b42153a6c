"""List the attention kernels for packed rows. Jax is not imported, so that the flags can read the list."""

KERNELS = ("xla", "cudnn", "splash", "blockwise")
