"""RepGhostNet: the network, its reparameterization, and what trains and evaluates it."""

from repghost.model import WIDTHS, RepGhostNet
from repghost.reparameterize import reparameterize
from repghost.weights import load_weights, repghostnet

__all__ = ["WIDTHS", "RepGhostNet", "load_weights", "reparameterize", "repghostnet"]
