"""Evaluation: prepare samples, predict, score."""
