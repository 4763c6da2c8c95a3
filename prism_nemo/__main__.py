"""`python -m prism_nemo …` is `prism-nemo …`; torchrun starts it so."""

from __future__ import annotations

import sys

from prism_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main())
