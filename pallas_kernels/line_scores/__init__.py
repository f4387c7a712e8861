"""Column and diagonal sums of the last queries' attention: see README.md."""

from pallas_kernels.line_scores.api import line_scores as line_scores
