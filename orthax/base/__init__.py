"""What JAX asks of every function and transformation, answered once.

* `check`: arguments of a call. * `leaves`: paths, floating matrices, dtypes that stay, meshes.
* `each_matrix`: functions of a matrix as transformations. * `with_memory`: functions with state.
* `placing`: arrays where others lie. * `platform`: functions by the platform of a program.

On meshes: * `reading`: how leaves become stacks. * `groups`, `owners`: which leaves share one, and
who owns its matrices. * `exchange`: the collectives. * `whole_matrices`, `whole_on_auto`,
`whole_on_subsets`, `block_periodic`: updates by the owners, by the kind of mesh. * `turned`:
matrices with one axis whole. * `given_shardings`, `one_way`: what users and leaves tell of layouts.
"""
