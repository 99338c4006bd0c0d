"""The records that `spell.client` gives back."""

from spellq_sdk.models import LogEntry, LsLine, RangeSpec, User, ValueSpec

__all__ = ["LogEntry", "LsLine", "RangeSpec", "User", "ValueSpec"]
