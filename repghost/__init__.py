"""RepGhostNet: the network, its reparameterization, and what trains and evaluates it."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repghost.model import WIDTHS, RepGhostNet
    from repghost.reparameterize import reparameterize
    from repghost.weights import load_weights, repghostnet

__all__ = ["WIDTHS", "RepGhostNet", "load_weights", "reparameterize", "repghostnet"]

_MODULE_OF = {
    "WIDTHS": "model",
    "RepGhostNet": "model",
    "load_weights": "weights",
    "repghostnet": "weights",
    "reparameterize": "reparameterize",
}


class _Package(ModuleType):
    """This package: its names are imported at their first use, since loading torch takes longer than --help may."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{self.__name__}.{_MODULE_OF[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MODULE_OF and isinstance(value, ModuleType):
            value = getattr(value, name)  # the function, not the module that the import system puts here
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
