"""Checkpoints in and out: where tensors come from, what they are called, where they go."""
