"""Full optimizers, one paper per file, each a short chain of transformations."""

from orthax.optimizers.auon import auon as auon
from orthax.optimizers.dct_adamw import dct_adamw as dct_adamw
from orthax.optimizers.hybrid_auon import hybrid_auon as hybrid_auon
from orthax.optimizers.muon import muon as muon
from orthax.optimizers.normuon import normuon as normuon
from orthax.optimizers.root import root as root
from orthax.optimizers.trion import trion as trion
