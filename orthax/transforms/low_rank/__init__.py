"""`low_rank`: any transformation, run in the few dimensions that hold most of each gradient.

* `projection`: the transformation. * `frames`: one leaf and its subspace, on whatever mesh.
* `subspaces`: families of bases. * `inner_state`: moments that follow them. * `quantized`: buffers.
"""
