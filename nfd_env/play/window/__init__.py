"""The keyboard window (pygame-ce): play a learned world, or any Gymnasium env with a keymap.

``display`` (whether there is one), ``hud`` (what is drawn), ``gamepad``, ``files`` (what is kept)
and ``player``, which has ``KeyboardPlayer`` and ``play``.
"""
