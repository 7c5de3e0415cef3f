"""Ports: lanes for tensors between two processes."""

from infinillm.transport.base import Listener, Port
from infinillm.transport.lanes import KINDS, Lanes, choose, host_key

__all__ = ["KINDS", "Lanes", "Listener", "Port", "choose", "host_key"]
