"""Sensitivity Dropout (SeND) and the Efficient EigenScore (EES): train with `recipe`, detect with `detector`.

The README beside this file says which module holds what. Nothing is imported here, so that each part costs only itself.
"""
