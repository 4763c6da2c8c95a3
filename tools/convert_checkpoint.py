"""`prism-nemo convert`, for those who look for a script: python tools/convert_checkpoint.py import --hf DIR --out DIR"""

from __future__ import annotations

import sys

from prism_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
