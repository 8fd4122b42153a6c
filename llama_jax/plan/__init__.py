"""What will run on which device, before it runs."""
