"""Parameters in and out of files, and between layer layouts.

May import jax, flax, orbax, safetensors, tensorstore and longt5_flax.config.
"""
