"""Agents that learn to play in worlds: the native PPO, and how well it does in the real game."""
