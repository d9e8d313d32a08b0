"""Real games: any Gymnasium environment that shows frames, made to look like a recording."""
