"""The simulator: the cluster's own decisions over a virtual clock, on hardware and traffic that are data."""
