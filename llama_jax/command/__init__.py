"""Run the commands: parse, call, print."""
