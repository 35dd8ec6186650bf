"""One file per search: what varies, within which ranges, and what is best."""
