"""Sensitivity Dropout (SeND) and the Efficient EigenScore (EES)."""
