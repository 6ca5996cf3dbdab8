"""Array operations that know no optimizer: 8-bit codes, 8-bit Adam, the lift, GPU kernels."""
