"""Decide which programs run on which device, before they run."""
