"""The control plane: launching, stopping, waiting, and keeping every deadline."""
