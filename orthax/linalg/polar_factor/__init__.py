"""The polar factor: polynomial and rational iterations, their step tables, and which to take when.

`choice` is where `polar` picks a method; the `tables` files make `orthax.linalg.coefficients`.
"""
