"""Between parameter trees and matrices.

* `view`: how one array is read as matrices. * `path_rules`, `default_rule`: which one is, and along
which axes. * `partition`: that over a tree, for transformations. * `explain`: the same as a table.
"""
