"""Which names do the dimensions of an operator have, and along which can it be cut? A file for each family of rules."""

from tersor.planner.graph.rules import products, reductions, selections, shapes
from tersor.planner.graph.rules.base import RULES, base_name, signature_of

__all__ = ["RULES", "base_name", "products", "reductions", "selections", "shapes", "signature_of"]
