"""Fails unless this virtual environment's torch lies outside of it, and what was installed into it loads beside that."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit("there is no torch")
if Path(spec.origin).is_relative_to(sys.prefix):
    sys.exit(f"torch was installed into {sys.prefix}: the base's was to stay")
missing = []
for line in importlib.metadata.requires("megatron-core") or []:
    name = line.split(";")[0].split("[")[0].strip(" ()<>=!~.0123456789,")
    if "extra ==" not in line and importlib.util.find_spec(name.replace("-", "_")) is None:
        missing.append(name)
if missing:
    sys.exit(f"megatron-core misses {', '.join(missing)}")
print(f"torch {importlib.metadata.version('torch')} of {spec.origin}")
