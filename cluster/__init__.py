"""The ground: connecting to Ray, storage, the model registry, many nodes on one machine."""

from cluster.connection import Connection, connect

__all__ = ["Connection", "connect"]
