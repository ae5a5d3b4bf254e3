"""Fixed orthonormal bases, and which of their columns hold most of a matrix."""
