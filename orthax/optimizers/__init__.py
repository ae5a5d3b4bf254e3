"""Full optimizers, one paper per file, each a short chain of transformations."""

from orthax.optimizers.muon import muon as muon
from orthax.optimizers.normuon import normuon as normuon
