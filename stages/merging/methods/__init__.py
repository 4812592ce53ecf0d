"""Merge methods that mergekit lacks, registered with it. A new method is one new file here: it is found by itself."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)
