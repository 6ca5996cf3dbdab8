"""Language models in Flax Linen."""
