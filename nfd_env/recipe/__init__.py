"""From a game's id to a playable world: what to record, how to train, and whether it is good."""
