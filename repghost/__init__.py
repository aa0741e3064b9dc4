"""RepGhostNet: the network, its reparameterization, and what trains and evaluates it."""

from repghost.model import WIDTHS, RepGhostNet, repghostnet
from repghost.reparameterize import reparameterize

__all__ = ["WIDTHS", "RepGhostNet", "reparameterize", "repghostnet"]
