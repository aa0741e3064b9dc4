"""RepGhostNet: the network, its reparameterization, and what trains and evaluates it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repghost.model import WIDTHS, RepGhostNet
    from repghost.predict.predictor import classify
    from repghost.reparameterization import reparameterize
    from repghost.weights import load_weights, read_description, repghostnet

__all__ = ["WIDTHS", "RepGhostNet", "classify", "load_weights", "read_description", "reparameterize", "repghostnet"]

_MODULES = {
    "WIDTHS": "model", "RepGhostNet": "model", "classify": "predict.predictor", "reparameterize": "reparameterization",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports PyTorch, which takes seconds, only for those who ask for a network: commands begin with less."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"repghost.{_MODULES.get(name, 'weights')}"), name)
