"""SPE: stable and expressive positional encodings of graphs, a backbone that uses them, and the usual baselines.

The README beside this file says which module holds what. Nothing is imported here, so that each part costs only itself.
"""
