"""What is run and compared: the demo, and one function behind each command."""
