"""What passes between the parts, and what reads files."""
