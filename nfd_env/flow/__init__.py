"""The mathematics of the generative model: pure functions, torch only."""
