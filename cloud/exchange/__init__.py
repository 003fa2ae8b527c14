"""Where autograd meets the wire."""
