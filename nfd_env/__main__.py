"""``python -m nfd_env``: the ``nfd`` command."""

from __future__ import annotations

import sys

from nfd_env.cli import main

if __name__ == "__main__":
    sys.exit(main())
