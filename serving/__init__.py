"""One file per online endpoint, and the application that deploys them on Ray Serve."""
