"""The optax face: `galore`, `chain`, the ready-made optimizers, and how updates are applied."""
