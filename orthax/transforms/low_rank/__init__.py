"""`low_rank`: any transformation, run in the few dimensions that hold most of each gradient.

* `projection`: the transformation. * `frames`: one leaf and its subspace, on whatever mesh.
* `subspaces`: the families of bases. * `inner_state`: moments that follow a change of subspace.
* `quantized`: a buffer in 8 or 4 bits an entry.
"""
