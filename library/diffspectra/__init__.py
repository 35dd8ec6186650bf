"""DiffSpectra: molecules from their UV-Vis, IR and Raman spectra, by diffusion of graphs and geometries together.

The README beside this file says which module holds what. Nothing is imported here, so that each part costs only itself.
"""
