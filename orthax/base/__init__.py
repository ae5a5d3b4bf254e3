"""What JAX asks of every function and transformation, answered once.

* `check`: arguments of a call. * `leaves`: paths, floating matrices, dtypes that stay, meshes.
* `each_matrix`: functions of a matrix as transformations. * `with_memory`: functions with state.
* `placing`: arrays where others lie.
"""
