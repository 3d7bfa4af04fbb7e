"""What the `learned` solver trains, and how; torch is imported by these modules and by no other solver.

grids.py      a matrix whose codes and scales can be moved by gradients
descent.py    the matrices of one block, moved together until the block's own output is right
"""
