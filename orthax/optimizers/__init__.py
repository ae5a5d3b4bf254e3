"""Full optimizers, one paper per file, each a short chain of transformations; `orthax` offers them.

`muon` explains the arguments that all of them share; `parts` holds the steps that they share.
"""
