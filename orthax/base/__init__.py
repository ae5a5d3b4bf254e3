"""What JAX asks of every function and transformation, answered once.

* `check`: arguments of a call. * `leaves`: paths, floating matrices, dtypes that stay, meshes.
* `each_matrix`: from a function of one matrix to a transformation of trees. * `with_memory`:
functions that carry something from call to call.
"""
