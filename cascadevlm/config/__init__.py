"""From a TOML file to a cascade."""
