"""Types that the parts exchange, and functions that read files."""
