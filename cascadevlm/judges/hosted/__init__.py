"""What judges behind an API share."""
