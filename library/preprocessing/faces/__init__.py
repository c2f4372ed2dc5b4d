"""Pictures turned, scaled and cut around faces."""
