"""Transformations of trees of matrices, one idea per file; `orthax` offers them.

Most are a function of one matrix that `orthax.base.each_matrix` makes a transformation of.
"""
