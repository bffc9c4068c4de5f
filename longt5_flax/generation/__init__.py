"""How a model writes: decoding loops over a step function and its cache.

May import jax; the model comes as an argument.
"""
