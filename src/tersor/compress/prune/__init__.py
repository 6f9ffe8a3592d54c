"""Which weights of a layer become zero, and what do the others become?"""

from tersor.compress.prune.pattern import SCOPES, Pattern
from tersor.compress.prune.recipe import ALGORITHMS, Algorithm, Pruned, get_algorithm, prune

__all__ = ["ALGORITHMS", "SCOPES", "Algorithm", "Pattern", "Pruned", "get_algorithm", "prune"]
