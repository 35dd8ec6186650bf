"""FARMS: heavy-tailedness of layers without the bias of their shapes, and what it decides: pruning and learning rates.

`farms.analyze(model)` is the front door. The README beside this file says which module holds what.
"""

from library.farms.analysis import Settings, analyze

__all__ = ["Settings", "analyze"]
