"""Text from a split model: tokens are chosen here, from true logits."""
