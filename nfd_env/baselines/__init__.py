"""Rivals of next-frame diffusion, to be measured against it by the same commands.

The rest of the package knows them by their names in ``nfd_env.worlds.rivals`` alone.
"""
