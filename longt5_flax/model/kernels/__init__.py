"""Kernels for one kind of device each, behind functions of model/.

May import jax; nothing of the package.
"""
