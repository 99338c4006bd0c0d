"""What Spell's client and command line shared, for the scripts that import it."""
