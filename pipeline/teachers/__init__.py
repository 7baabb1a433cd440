"""Teachers: opened, asked, their logits kept, several combined."""
