"""The `spellq` command (also installed as `spell`)."""
