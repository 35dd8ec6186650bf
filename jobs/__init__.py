"""One file per job that runs on the cluster, and the one distributed training loop."""
