"""Quantum reservoirs for time series: onion reservoirs whose memory time scales are eigenvalues of a channel.

`library.qrc.reservoir` holds the protocol of every reservoir and the quantum one. The README
says which module does what.
"""
