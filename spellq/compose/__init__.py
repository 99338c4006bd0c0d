"""Builds runtimes from settings: the only rooms that know every adapter."""
