"""What every adapter of a port must do. An adapter joins by a fixture in conftest.py."""
