"""Causal language models, their tokenisers and texts: what every method on language models starts from.

corpus, material     texts of a shipped sample, a file or a hub data set, as token streams
tokens, token_store  tokenisers, and streams of tokens in memory or on disk
pythia, hub          new models by size, weights from folders, artifacts and the hub
"""
