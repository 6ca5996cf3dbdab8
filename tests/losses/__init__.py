"""Losses of many kinds, each with the way in which its kernels' gradients are to be computed."""
