"""Array operations, independent of optimizers: 8-bit codes, 8-bit Adam, the lift, GPU kernels."""
