"""Several questions about one context, in the manner of SCBench (Li et al. 2024)."""
