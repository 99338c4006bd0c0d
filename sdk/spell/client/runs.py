"""Runs, as Spell's scripts import them."""

from spellq_sdk.blocking import Run, RunsService

__all__ = ["Run", "RunsService"]
