"""The agent's side of a machine: worlds for commands, their slot helpers, logs and outputs."""
