"""The records that `spell.client` gives back."""

from spellq_sdk.models import LogEntry, LsLine, User

__all__ = ["LogEntry", "LsLine", "User"]
