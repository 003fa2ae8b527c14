"""The device: data, embedding, head, adapters, optimizer and checkpoints. No torch."""
