"""The built-in backends, one module each, registered through entry points like anybody's."""
