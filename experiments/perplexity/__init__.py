"""Perplexity by length."""
