"""Time to first token of whole models by prompt length (paper, Figures 1b and 2a)."""
