"""Triton kernels, one file per op, named as in `seal_fast.ops`."""
