"""Post-training methods by name. A new method is one new file here: it is found by itself.

A class says in the first paragraph of its docstring what it trains, and in the second what speaks for it: the table of
docs/methods.md is made from them.
"""

import importlib
import pkgutil

from stages.settings.stage import Stage

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)

METHODS: dict[str, type[Stage]] = {method.name(): method for method in Stage.choices()}
