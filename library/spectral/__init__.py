"""The spectral core shared by the methods: traces and densities of symmetric operators."""
