"""`fp4bench tune`: find the launches that a GPU's table of `fp4bench.kernels.configs` holds, by measuring.

It stands after `timing`, whose paced clock it measures with, and so outside of `kernels`: those know which launches are worth a
try, and take what the table says. Nothing here runs while a case is timed or a request served.
"""
