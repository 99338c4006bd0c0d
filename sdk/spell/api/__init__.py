"""Exceptions and plain records, where Spell's scripts import them from."""
