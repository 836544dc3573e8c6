"""Nets: what they see, how they learn, what they say of a picture. The only room that imports torch."""
