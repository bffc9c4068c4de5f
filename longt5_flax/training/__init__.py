"""How LongT5 learns: loss, optimizer, step, partitioning, checkpoints.

May import jax, flax, optax, orbax and longt5_flax.{config, model, interop}.
"""
