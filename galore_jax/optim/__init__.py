"""The optax interface: `galore`, `chain`, ready-made optimizers, and how updates are applied."""
