"""Status 0 where the Transformer Engine of this Python is one that megatron-core takes: 2.9 up to, not including, 2.12."""

import importlib.metadata
import sys

OLDEST, TOO_NEW = (2, 9), (2, 12)

try:
    found = importlib.metadata.version("transformer_engine")
except importlib.metadata.PackageNotFoundError:
    sys.exit("no Transformer Engine here: it is built")
version = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
if not OLDEST <= version < TOO_NEW:
    sys.exit(f"Transformer Engine {found} is not the one: another is built")
print(f"Transformer Engine {found} stays")
