"""Images decoded by processes, in an order that resumes."""
