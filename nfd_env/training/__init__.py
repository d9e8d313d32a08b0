"""Training: one loop (``loop.py``), and one file a stage that says what its loss is."""
