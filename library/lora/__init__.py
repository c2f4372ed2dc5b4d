"""Networks in files: read, added to models, joined, made smaller, written."""
