"""Parameters in and out of files, and between layer layouts.

May import jax, orbax, safetensors, tensorstore and longt5_flax.config.
"""
