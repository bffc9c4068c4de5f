"""What LongT5 computes: pure functions over arrays, Linen modules over them.

May import jax, flax and longt5_flax.config.
"""
