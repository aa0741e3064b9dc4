"""RepGhostNet: the network, its reparameterization, and what trains and evaluates it.

These names are imported when they are first used: what needs no network, such as `--help`, does without torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repghost.model import WIDTHS, RepGhostNet
    from repghost.reparameterize import reparameterize
    from repghost.weights import load_weights, repghostnet

__all__ = ["WIDTHS", "RepGhostNet", "load_weights", "reparameterize", "repghostnet"]

_MODULES = {"WIDTHS": "model", "RepGhostNet": "model", "reparameterize": "reparameterize"}  # the other names: weights


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module: Any = import_module(f"{__name__}.{_MODULES.get(name, 'weights')}")
    return getattr(module, name)


class _Package(ModuleType):
    """Keeps `repghost.reparameterize` the function: an import of the module of that name would put it there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "reparameterize":
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
