"""What a Mac does that could not be tried where this was written: measured by its owner, in one command."""
