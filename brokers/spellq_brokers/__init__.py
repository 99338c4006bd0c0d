"""Adapters of the store and bus ports: `embedded` needs no services."""
