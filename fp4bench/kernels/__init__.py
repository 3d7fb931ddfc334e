"""Kernels of our own, in Triton and Gluon: one operation a file, launch choice in `configs`.

Importing this package imports torch only; each kernel's module needs Triton. `weights` says how a weight lies in memory.
"""
