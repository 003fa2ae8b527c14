"""A base model's own code as graphs: its blocks are called, traced and cut. No family is named here."""
