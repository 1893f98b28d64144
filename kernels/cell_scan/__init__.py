"""Recurrences that take one step after the other, as fused kernels.

`cell_scan` takes the step of any nonlinear cell, written for one sequence, and
makes a kernel of it whose loop over time keeps weights and state on chip: many
sequences side by side as the rows of matrix products, forward and backward.
`Lanes` is the loop of the diagonal linear recurrence.
"""

from memzoo.kernels.cell_scan.driver import cell_scan as cell_scan
from memzoo.kernels.cell_scan.lanes import Lanes as Lanes
from memzoo.kernels.cell_scan.rows import product as product
