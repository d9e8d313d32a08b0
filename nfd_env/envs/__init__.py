"""Gymnasium environments: the learned world, and the real game seen through the same eyes."""
