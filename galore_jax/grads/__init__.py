"""Projected gradients: losses rewritten so that their backward pass gives coordinates."""
