"""The names Spell's users know, served by spellq: `import spell.client`, `import spell.metrics`."""
