"""The polar factor: polynomial and rational iterations, their step tables, and which to take when.

`choice` is where `polar` picks a method; `tables`, `shape_tables` and `shipped_tables` make what
`orthax.linalg.coefficients` offers.
"""
