"""Agents that record, learn in and play the worlds; ``nfd_env`` never imports them."""
