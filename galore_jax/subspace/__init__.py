"""One parameter and its subspace: how it is viewed as matrices, projected, and refreshed."""
