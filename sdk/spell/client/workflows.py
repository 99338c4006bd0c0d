"""Workflows, as Spell's scripts import them."""

from spellq_sdk.blocking import Workflow

__all__ = ["Workflow"]
