"""The ground: connecting to Ray, storage, the model registry, many nodes on one machine."""
