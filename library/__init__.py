"""The science: every method, usable alone in a notebook. Never imports Ray."""
