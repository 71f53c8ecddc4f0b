"""Judges that answer through a provider's batch API."""
