"""The built-in backends, one module per backend. They are registered through entry points, in the same way as plug-ins."""
