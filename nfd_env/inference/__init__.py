"""Stepping a trained world: the model behind ``start`` and ``step``, noise, speculation."""
